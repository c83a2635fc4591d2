"""Compile a small VAE's decoder on eight simulated devices and print, as JSON, what its program
gathers. Needs XLA's 8 host devices."""

from __future__ import annotations

import json
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import MeshConfig
from pixart_jax.models.vae import AutoencoderKL, VAEConfig
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh

module = AutoencoderKL(VAEConfig(block_out_channels=(128, 256), norm_num_groups=8))
images = jnp.zeros((1, 32, 32, 3))
boxed = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
mesh = make_mesh(MeshConfig(data=1, fsdp=8))
params = jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
    rules.unboxed(boxed),
    rules.parameter_shardings(boxed, mesh),
)
latents = jax.ShapeDtypeStruct((8, 24, 24, 4), jnp.float32, sharding=rules.batch_sharding(mesh))
with jax.set_mesh(mesh), nn.logical_axis_rules(rules.RULES):
    decode = jax.jit(lambda params, x: module.apply({"params": params}, x, method="decode"))
    text = decode.lower(params, latents).compile().as_text()
gathered = re.findall(r"= \(?\w+\[([\d,]*)\][^=]* all-gather(?:-start)?\(", text)
sizes = sorted({math.prod(map(int, dims.split(","))) for dims in gathered if dims}, reverse=True)
print(
    json.dumps(
        {
            "gathered": sizes,
            "kernels": sorted(
                {int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)}, reverse=True
            ),
        }
    )
)

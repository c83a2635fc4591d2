"""Kernels over a mesh of 8 simulated devices beside one device: print as JSON the largest
differences, of outputs and of gradients.

Splash is interpreted; batches that the mesh divides and one that it does not, with lengths and
without.
"""

from __future__ import annotations

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import MeshConfig
from pixart_jax.models.attention import dense, splash
from pixart_jax.models.attention.over_mesh import shard_kernel
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh


def difference(mesh, batch: int, lengths) -> float:
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (batch, 128, 2, 8)) for key in keys)
    kernel = functools.partial(splash.attend, interpret=True)

    def both(attend):
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(d_out)

    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.RULES):
        ours = jax.jit(lambda: both(lambda *qkv: shard_kernel(kernel, *qkv, lengths, 0.3)))()
    theirs = both(lambda *qkv: dense.attend(*qkv, lengths, None, 0.3))
    return max(
        float(np.abs(np.asarray(a) - np.asarray(b)).max())
        for a, b in zip(ours, theirs, strict=True)
    )


def main() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found = {
        "plain": difference(mesh, 4, None),
        "lengths": difference(mesh, 4, jnp.array([0, 1, 70, 128])),
    }
    print(json.dumps(found | {"undivided": difference(mesh, 3, jnp.array([128, 0, 5]))}))


if __name__ == "__main__":
    main()

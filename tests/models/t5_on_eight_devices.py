"""Encode on 1 and on 8 simulated devices, with fp32 and with int8 kernels; print what came of it as
JSON. Needs XLA's 8 host devices."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from pixart_jax.config import MeshConfig
from pixart_jax.models.t5 import T5Config, T5Encoder
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh

sys.path.insert(0, str(Path(__file__).parent))
from t5_reference import quantized

from tests.parallel.replicated import large_replicated

# Wide enough that even the int8 values of a projection are over the limit above which nothing may
# be replicated.
CONFIG = T5Config(vocab_size=1024, d_model=512, d_kv=64, d_ff=1280, num_layers=4, num_heads=8)


def gathers(program: str) -> list[tuple[str, int]]:
    """(element type, elements) of each all-gather in a compiled program."""
    found = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", program)
    return [(kind, math.prod(int(n) for n in shape.split(",") if n)) for kind, shape in found]


def compare(quantization: str | None) -> dict:
    """Of 8 devices: relative error against one, arrays that are whole on each, bytes of parameters
    on each and in all, and the element types of the large arrays that are gathered.
    """
    rng = np.random.default_rng(0)
    ids, lengths = (
        rng.integers(0, CONFIG.vocab_size, (8, 40)),
        np.array([40, 33, 1, 7, 12, 40, 25, 18]),
    )
    module = T5Encoder(CONFIG, quantization=quantization)
    boxed = jax.eval_shape(module.init, jax.random.key(0), ids, lengths)["params"]
    params = jax.tree.map(
        np.asarray, nn.unbox(T5Encoder(CONFIG).init(jax.random.key(0), ids, lengths))["params"]
    )
    if quantization:
        params = quantized(params)

    def encode(params, ids, lengths):
        return module.apply({"params": params}, ids, lengths)

    one = np.asarray(jax.jit(encode)(jax.device_put(params, jax.devices()[0]), ids, lengths))

    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    spread = jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(
            array.shape, sharding, lambda part: array[part]
        ),
        params,
        rules.parameter_shardings(boxed, mesh),
    )
    batch = rules.batch_sharding(mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.RULES):
        compiled = (
            jax.jit(encode)
            .lower(spread, jax.device_put(ids, batch), jax.device_put(lengths, batch))
            .compile()
        )
        eight = np.asarray(
            compiled(spread, jax.device_put(ids, batch), jax.device_put(lengths, batch))
        )
    counted = (np.arange(ids.shape[1]) < lengths[:, None])[..., None]
    held = {device: 0 for device in mesh.devices.flat}
    for leaf in jax.tree.leaves(spread):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return {
        "error": float(np.abs((eight - one) * counted).max() / np.abs(one * counted).max()),
        "gathered": sorted(
            {kind for kind, size in gathers(compiled.as_text()) if size >= CONFIG.d_model**2 / 4}
        ),
        "replicated": large_replicated(spread),
        "held": max(held.values()),
        "all": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    }


if __name__ == "__main__":
    print(json.dumps({str(quantization): compare(quantization) for quantization in (None, "int8")}))

"""Small programs whose collectives are known by construction, compiled for 8 simulated devices;
prints what is read of them as JSON."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pixart_jax.config import MeshConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.planning.collectives import collectives

MESH = make_mesh(MeshConfig(data=2, fsdp=2, context=1, tensor=2))


def mapped(body, inside, outside):
    return jax.shard_map(body, mesh=MESH, in_specs=inside, out_specs=outside, check_vma=False)


def gathered(x):  # [8, 16] fp32 cut over fsdp: the whole is 512 bytes
    return mapped(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), P("fsdp"), P())(x)


def summed_in_a_loop(x):  # 5 sums of [8, 16] fp32 over data and fsdp together
    def turn(x, _):
        return jax.lax.psum(x, ("data", "fsdp")) * 0.5, None

    return mapped(lambda x: jax.lax.scan(turn, x, None, length=5)[0], P(), P())(x)


def nested(x):  # 3 × 4 rotations of [4, 16] fp32 along tensor
    def inner(x, _):
        return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]) + 1.0, None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=4)[0] * 2.0, None

    return mapped(lambda x: jax.lax.scan(outer, x, None, length=3)[0], P("tensor"), P("tensor"))(x)


def scattered(x):  # [8, 16] fp32 summed over data, each device left with half
    return mapped(lambda x: jax.lax.psum_scatter(x, "data", tiled=True), P(), P("data"))(x)


def exchanged(x):  # [4, 16] fp32 a device, rows for columns over fsdp
    return mapped(
        lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True), P("fsdp"), P(None, "fsdp")
    )(x)


def alone(x):
    return mapped(lambda x: x * 2.0, P("fsdp"), P("fsdp"))(x)


found = {}
for program in (gathered, summed_in_a_loop, nested, scattered, exchanged, alone):
    text = jax.jit(program).lower(jax.ShapeDtypeStruct((8, 16), jnp.float32)).compile().as_text()
    found[program.__name__] = [
        dataclasses.asdict(c) for c in collectives(text, MESH.axis_names, MESH.devices.shape)
    ]
print(json.dumps(found))

"""The device mesh: four named axes, their sizes given by a config and checked against the devices at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import jax

from pixart_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


class Sizes(Protocol):
    """What :func:`make_mesh` needs of a config: a size for each axis, at most one of them −1 (the rest)."""

    data: int
    fsdp: int
    context: int
    tensor: int


def make_mesh(sizes: Sizes, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of axes (data, fsdp, context, tensor) over ``devices`` (all of the run's by default).

    Raises UserError when the sizes do not use exactly these devices: an idle device is a mistake too.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = [getattr(sizes, axis) for axis in AXES]
    if -1 in shape:
        others = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = max(1, len(devices) // others)
    if math.prod(shape) != len(devices):
        asked = " × ".join(f"{axis} {getattr(sizes, axis)}" for axis in AXES)
        fits = ", ".join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)
        count = len(devices)
        raise UserError(
            f"mesh {asked} does not fit {count} device(s): the product must be {count}; sizes that divide it: {fits} (-1: the rest)"
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """How many parts a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]

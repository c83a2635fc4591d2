"""The device mesh: four named axes, their sizes given by a config and checked against the devices
at hand, and what must divide by them.

Devices of several TPU slices are joined by a network that is far slower than the links within one.
A batch's gradient crosses the data axis once a step, everything else many times, so slices lie
along data and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils

from pixart_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


class Sizes(Protocol):
    """What :func:`make_mesh` needs of a config: a size for each axis, at most one of them −1 (the
    rest)."""

    data: int
    fsdp: int
    context: int
    tensor: int


def make_mesh(sizes: Sizes, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of axes (data, fsdp, context, tensor) over ``devices`` (all of the run's by
    default).

    Raises UserError when the sizes do not use exactly these devices (an idle device is a mistake
    too), and where data does not divide by the number of TPU slices.
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
            f"mesh {asked} does not fit {count} device(s): the product must be {count}; sizes "
            f"that divide it: {fits} (-1: the rest)"
        )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if slices(devices) > 1:
        return jax.sharding.Mesh(multislice_mesh(shape, devices), AXES, axis_types=types)
    return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=devices)


def slices(devices: Sequence[jax.Device]) -> int:
    """How many TPU slices the devices belong to; 1 on other platforms, whose hosts follow each
    other in the order of the devices."""
    return (
        len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
        or 1
    )


def multislice_mesh(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices of several slices in the shape (data, fsdp, context, tensor): a slice is a run of
    rows along data."""
    count, data = slices(devices), shape[0]
    if data % count:
        raise UserError(
            f"mesh data {data} is not a multiple of the {count} slices: they lie along data, and "
            "no other axis may cross them"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // count, *shape[1:]), (count, 1, 1, 1), devices
    )


def batch_shards(mesh: jax.sharding.Mesh) -> int:
    """How many parts a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(
    mesh: jax.sharding.Mesh,
    what: str,
    *,
    heads: int | None = None,
    mlp_width: int | None = None,
    tokens: dict[str, int] | None = None,
) -> None:
    """Raises UserError, naming ``what``, where the tensor axis does not divide heads or the MLP, or
    context the image tokens.

    tokens: for each size or bucket, by the name it is to be called, its image tokens.
    """
    _check_axis(
        mesh,
        "tensor",
        what,
        {
            name: n
            for name, n in ((f"{heads} heads", heads), (f"MLP width {mlp_width}", mlp_width))
            if n
        },
    )
    _check_axis(
        mesh, "context", what, {f"{name} ({n} tokens)": n for name, n in (tokens or {}).items()}
    )


def _check_axis(mesh: jax.sharding.Mesh, axis: str, what: str, numbers: dict[str, int]) -> None:
    """numbers: what the axis must divide, by how it is called."""
    size = mesh.shape[axis]
    odd = [name for name, n in numbers.items() if n % size]
    if odd:
        fits = [
            str(n)
            for n in range(1, 2 * size + 1)
            if not any(number % n for number in numbers.values())
        ]
        fits = " or ".join([", ".join(fits[:-1]), fits[-1]] if len(fits) > 1 else fits)
        raise UserError(
            f"{what}: mesh {axis} {size} does not divide {', '.join(odd)}; {axis} {fits} would do"
        )

"""The device mesh: four named axes, their sizes given by a config and checked against the devices.

Devices of several TPU slices are joined by a network that is far slower than the links within one.
A batch's gradient crosses the data axis once a step, everything else many times, so slices lie
along data and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from pixart_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def resolve_sizes(sizes: Any, devices: int) -> tuple[int, int, int, int]:
    """Sizes of the four axes on so many devices. sizes: a MeshConfig; −1 is the rest.

    Raises UserError unless the sizes use exactly these devices: an idle device is a mistake too.
    """
    shape = [getattr(sizes, axis) for axis in AXES]
    if -1 in shape:
        others = math.prod(n for n in shape if n != -1)
        shape[shape.index(-1)] = max(1, devices // others)
    if math.prod(shape) != devices:
        asked = " × ".join(f"{axis} {getattr(sizes, axis)}" for axis in AXES)
        fits = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise UserError(
            f"mesh {asked} does not fit {devices} device(s): the product must be {devices}; sizes "
            f"that divide it: {fits} (-1: the rest)"
        )
    data, fsdp, context, tensor = shape
    return data, fsdp, context, tensor


def make_mesh(sizes: Any, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of axes (data, fsdp, context, tensor) over ``devices``, by default all of the run's.

    Raises UserError as :func:`resolve_sizes`, and where data is not a multiple of the TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_sizes(sizes, len(devices))
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    if slices(devices) > 1:
        return jax.sharding.Mesh(multislice_mesh(shape, devices), AXES, axis_types=types)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def slices(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices that the devices belong to; 1 on other platforms."""
    return len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1


def multislice_mesh(shape: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices of several slices in the shape (data, fsdp, context, tensor); slices along data."""
    count, data = slices(devices), shape[0]
    check_slices(data, count)
    return mesh_utils.create_hybrid_device_mesh(
        (data // count, *shape[1:]), (count, 1, 1, 1), devices
    )


def check_slices(data: int, count: int) -> None:
    """Raise UserError unless data is a multiple of the number of slices."""
    if data % count:
        raise UserError(
            f"mesh data {data} is not a multiple of the {count} slices, which lie along data"
        )


def batch_shards(mesh: jax.sharding.Mesh | None) -> int:
    """Number of parts that a batch is split into."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    what: str,
    *,
    heads: int | None = None,
    mlp_width: int | None = None,
    tokens: Mapping[str, int] | None = None,
) -> None:
    """Raise UserError, naming ``what``, where the tensor axis does not divide the heads or the MLP,
    or context the image tokens.

    tokens: image tokens by the name of each size or bucket.
    """
    widths = {f"{heads} heads": heads, f"MLP width {mlp_width}": mlp_width}
    counts = {f"{name} ({n} tokens)": n for name, n in (tokens or {}).items()}
    for axis, numbers in (("tensor", widths), ("context", counts)):
        size, given = mesh.shape[axis], {name: n for name, n in numbers.items() if n}
        if odd := [name for name, n in given.items() if n % size]:
            common = math.gcd(*given.values())
            *first, last = [str(n) for n in range(1, 2 * size + 1) if common % n == 0]
            fits = f"{', '.join(first)} or {last}" if first else last
            raise UserError(
                f"{what}: mesh {axis} {size} does not divide {', '.join(odd)}; {axis} {fits} "
                "would do"
            )

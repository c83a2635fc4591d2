"""A kernel on every device of a mesh: the partitioner cannot look inside one, so each device is
given its samples and heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

from pixart_jax.parallel.axes import ACT_HEADS, BATCH


def shard_kernel(
    kernel: Callable,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    scale: float,
) -> jax.Array:
    """kernel(q, k, v, lengths, scale) with batch and heads cut as flax's logical axis rules say;
    tokens lie whole.

    A dimension that its axes do not divide is whole on each device. Without a mesh, without rules,
    or within a shard_map that has given each device its share already (models/context.py), the
    kernel is called as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not nn.get_logical_axis_rules() or mesh.are_all_axes_manual:
        return kernel(q, k, v, lengths, scale)
    batch, heads = nn.logical_to_mesh_axes((BATCH, ACT_HEADS))
    batch, heads = _dividing(mesh, batch, q.shape[0]), _dividing(mesh, heads, q.shape[2])
    spec, per_sample = PartitionSpec(batch, None, heads, None), PartitionSpec(batch)
    if lengths is None:
        return jax.shard_map(
            lambda q, k, v: kernel(q, k, v, None, scale),
            in_specs=(spec,) * 3,
            out_specs=spec,
            check_vma=False,
        )(q, k, v)
    run = jax.shard_map(
        lambda q, k, v, lengths: kernel(q, k, v, lengths, scale),
        in_specs=(*(spec,) * 3, per_sample),
        out_specs=spec,
        check_vma=False,
    )
    return run(q, k, v, lengths)


def _dividing(mesh, axes, size: int):
    """The mesh axes, or None where together they do not divide the dimension."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    return axes if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

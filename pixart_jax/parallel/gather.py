"""Arrays between the mesh and the host where no process holds all of them: taken out row by row,
laid out part by part."""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# bytes; a larger array comes to the host a row at a time, so that no device holds it whole
_AT_ONCE = 1 << 28


def gather_to_host(array, row: int | None = None) -> np.ndarray:
    """``array``, or row ``row`` of its leading axis, whole on this host.

    Where processes share the array all must call this, in the same order. Only what is asked for is
    gathered: of a stack of layers [depth, …] one layer, so that neither a device nor a host holds
    more beside what it has.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array) if row is None else np.asarray(array)[row]
    if array.is_fully_replicated and next(iter(array.devices())).platform == "cpu":
        whole = np.asarray(array.addressable_data(0))  # a view
        return whole if row is None else whole[row]
    if row is None:
        if (
            math.prod(array.shape) * array.dtype.itemsize > _AT_ONCE
            and array.ndim > 1
            and not _cut(array, 0)
        ):
            whole = np.empty(array.shape, array.dtype)
            for number in range(array.shape[0]):
                whole[number] = gather_to_host(array, number)
            return whole
        if array.is_fully_addressable:
            return np.asarray(array)
        return np.asarray(_gather(array.sharding, False)(array).addressable_data(0))
    return np.asarray(_gather(array.sharding, True)(array, np.int32(row)).addressable_data(0))


def place_like(value, like: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of like's dtype and sharding: ``value`` itself where it lies so, else laid out from
    the same value on every process.

    value: a numpy array, a jax array of this process, or one that lies over the mesh. A device is
    given its own part alone.
    """
    if isinstance(value, jax.Array) and (
        not value.is_fully_addressable or value.sharding == like.sharding
    ):
        return jax.device_put(value.astype(like.dtype), like.sharding)
    if isinstance(value, jax.Array) and like.sharding.is_fully_addressable:
        return jax.device_put(value.astype(like.dtype), like.sharding)
    host = gather_to_host(value)
    return jax.make_array_from_callback(
        host.shape, like.sharding, lambda index: np.asarray(host[index], like.dtype)
    )


def put_global(value, sharding: jax.sharding.Sharding) -> jax.Array:
    """A numpy array, or a jax array of this process, the same on every process, under ``sharding``;
    random keys too."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.jit(lambda x: x, out_shardings=sharding)(value)


def _cut(array: jax.Array, axis: int) -> bool:
    """Whether an axis is split over devices."""
    return array.sharding.shard_shape(array.shape)[axis] != array.shape[axis]


@functools.cache
def _gather(sharding, row: bool):
    """The compiled copy to every device, of one row where ``row``; jit adds one executable a
    shape."""
    if not isinstance(sharding, NamedSharding):
        return jax.jit(_take if row else lambda x: x)
    whole = NamedSharding(sharding.mesh, PartitionSpec())
    if not row:
        return jax.jit(lambda x: x, out_shardings=whole)
    rest = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    # First the row, where it lies, and then its parts together: never the whole stack.
    return jax.jit(
        lambda x, i: jax.lax.with_sharding_constraint(_take(x, i), rest), out_shardings=whole
    )


def _take(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)

"""Arrays between the mesh and the host where no process holds all of them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# bytes; a larger array is gathered a row at a time, so that no device holds all of it
_AT_ONCE = 1 << 28


def gather_to_host(array: Any, row: int | None = None) -> np.ndarray:
    """``array``, or row ``row`` of its leading axis, complete on this host.

    Where processes share the array, all must call this in the same order. Only what is asked for is
    gathered: one layer of a stack [depth, …].
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array) if row is None else np.asarray(array)[row]
    if array.is_fully_replicated and next(iter(array.devices())).platform == "cpu":
        host = np.asarray(array.addressable_data(0))  # a view
        return host if row is None else host[row]
    if row is not None:
        return np.asarray(_gather(array.sharding, True)(array, np.int32(row)).addressable_data(0))
    stacked = array.ndim > 1 and array.sharding.shard_shape(array.shape)[0] == array.shape[0]
    if array.nbytes > _AT_ONCE and stacked:
        host = np.empty(array.shape, array.dtype)
        for number in range(array.shape[0]):
            host[number] = gather_to_host(array, number)
        return host
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(_gather(array.sharding, False)(array).addressable_data(0))


def place_like(value: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
    """``value`` with the dtype and sharding of ``like``; each device receives only its part.

    value: a numpy array or a jax array of this process, the same on every process, or on the mesh.
    """
    if isinstance(value, jax.Array) and (
        not value.is_fully_addressable
        or value.sharding == like.sharding
        or like.sharding.is_fully_addressable
    ):
        return jax.device_put(value.astype(like.dtype), like.sharding)
    host = gather_to_host(value)
    return jax.make_array_from_callback(
        host.shape, like.sharding, lambda index: np.asarray(host[index], like.dtype)
    )


def put_global(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array or key, the same on every process, under ``sharding``."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    return jax.jit(lambda x: x, out_shardings=sharding)(value)


@functools.cache
def _gather(sharding: jax.sharding.Sharding, row: bool) -> Any:
    """The jitted copy of an array, or of one row, to every device."""
    if not isinstance(sharding, NamedSharding):
        return jax.jit(_take if row else lambda x: x)
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    if not row:
        return jax.jit(lambda x: x, out_shardings=replicated)
    rest = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    # Each device first takes its part of the row, so that the stack is never gathered.
    return jax.jit(
        lambda x, i: jax.lax.with_sharding_constraint(_take(x, i), rest), out_shardings=replicated
    )


def _take(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)

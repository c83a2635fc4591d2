"""Parameters from a file to the devices, one tensor at a time.

A parameter is filled in host memory, one buffer for each part of it that this process's devices
hold: threads copy each tensor into its row, with axes and dtype converted, and the file's pages are
freed. On a CPU the buffer becomes the array. So the host holds the parameters of its CPU devices,
or, with accelerators, two parameters at most, and one tensor of the file.
"""

from __future__ import annotations

import concurrent.futures
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pixart_jax import finite
from pixart_jax.errors import UserError
from pixart_jax.weights.files import Tensors
from pixart_jax.weights.table import ParamMapping, flatten, match, unflatten

_THREADS = min(8, os.cpu_count() or 1)
_SLAB = 1 << 23  # elements that one thread copies at a time
_ROWS = 32  # of a transposed matrix, copied at a time: a cache line of bfloat16
_TILE = 1 << 16  # elements of any other array, copied and checked at a time, in the core's cache
_SHOW_PROGRESS = 3 << 30  # bytes, from which a progress bar is shown

Index = tuple[tuple[int, int], ...]  # (start, stop) along each axis


def read(
    table: Iterable[ParamMapping],
    shapes: Mapping,
    tensors: Mapping[str, np.ndarray],
    *,
    source: str | None = None,
    ignore: Iterable[str] = (),
    dtype: Callable[[str], np.dtype] | np.typing.DTypeLike = np.float32,
    shardings: Mapping | None = None,
    quantization: str | None = None,
) -> dict:
    """Our tree of jax arrays, from a file's tensors.

    shapes: our tree of anything with .shape. tensors: a file of files.py, or {key: array}; source:
    its name in messages. ignore: as for table.match, whose UserError names all that does not fit
    before anything is read; another names a tensor that is not finite, or is not in ``dtype``.
    dtype: of every parameter, or a function of a parameter's path. shardings: our tree of
    NamedSharding; None: the default device. quantization "int8": kernels become int8 values and
    scales (models/quantization.py), as shapes and shardings have them.
    """
    file = tensors if isinstance(tensors, Tensors) else None
    found_shapes = {k: file.shape(k) if file else np.shape(tensors[k]) for k in tensors}
    source = source or (file.source if file else "the file")
    matches = match(table, shapes, found_shapes, source=source, ignore=ignore)
    where = {} if shardings is None else flatten(shardings)
    dtype_of = dtype if callable(dtype) and not isinstance(dtype, type) else lambda path: dtype
    dtypes = {found.entry.path: np.dtype(dtype_of(found.entry.path)) for found in matches}
    total = sum(math.prod(found.shape) * dtypes[found.entry.path].itemsize for found in matches)
    upcoming = iter([name for found in matches for name in found.names][1:])
    params: dict[str, object] = {}
    latest = None
    with (
        concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        tqdm(
            total=total,
            desc="opening",
            unit="B",
            unit_scale=True,
            disable=total < _SHOW_PROGRESS,
            leave=False,
        ) as bar,
    ):
        for found in matches:
            path = found.entry.path
            leaf = _leaf_type(path, quantization)(found.shape, dtypes[path], where.get(path))
            for row, name in enumerate(found.names):
                view = found.entry.view(np.asarray(tensors[name]))
                copies = leaf.copies(view, row if found.entry.stacked else None)
                running = [pool.submit(_copy, *copy) for copy in copies]
                if file and (following := next(upcoming, None)):
                    file.prefetch(following)
                if not all([copy.result() for copy in running]):
                    raise UserError(
                        f"{source}: {name} holds numbers that are {finite.WHAT}: the file is "
                        "damaged, or of a training that diverged"
                    )
                if file:
                    file.release(name)
            jax.block_until_ready(latest)  # a transfer to an accelerator holds its buffer
            params[path] = latest = leaf.put()
            bar.update(sum(array.nbytes for array in jax.tree.leaves(latest)))
    jax.block_until_ready(latest)
    return unflatten(params)


def map_params(tensors: Tensors, shardings: Mapping | None = None) -> dict:
    """Our tree from a file in our own layout and dtypes, with the names of :func:`leaves`. On a
    single CPU device the arrays are the file's pages, read on first use."""
    where = {} if shardings is None else leaves(shardings)
    out: dict[str, jax.Array] = {}
    for name in tensors:
        value = tensors[name]
        out[name] = _put({_whole(value.shape): value}, value.shape, where.get(name))
        if jax.default_backend() != "cpu":
            jax.block_until_ready(out[name])
            tensors.release(name)
    for name in [name for name in out if name.endswith("/qvalue")]:
        from pixart_jax.models import quantization

        path = name.removesuffix("/qvalue")
        out[path] = quantization.leaf(out.pop(name), out.pop(f"{path}/scale"))
    return unflatten(out)


def leaves(tree: Mapping) -> dict[str, Any]:
    """{'blocks/q/kernel': array} of every array of a tree; those of an int8 kernel are
    'blocks/q/kernel/qvalue' and '…/scale'."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


class _Leaf:
    """A parameter being read: a buffer for each part of it that a device of this process holds."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding):
        self._shape, self._sharding = shape, sharding
        indices = {_whole(shape)} if sharding is None else set(_parts(shape, sharding).values())
        self._buffers = {
            index: _buffer([stop - start for start, stop in index], dtype) for index in indices
        }

    def copies(self, view: np.ndarray, row: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(part of a buffer, its values) of the whole parameter or of one row of a stack, in
        slabs."""
        for index, buffer in self._buffers.items():
            if row is not None:
                (start, stop), index = index[0], index[1:]
                if not start <= row < stop:
                    continue
                buffer = buffer[row - start]
            yield from _slabs(buffer, view[tuple(slice(*bounds) for bounds in index)])

    def put(self) -> object:
        """The parameter on its devices; the buffers must not be written to afterwards."""
        return _put(self._buffers, self._shape, self._sharding)


class _Int8Leaf:
    """A kernel being quantised while it is read, layer by layer."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding):
        *layers, _, outputs = shape
        self._values = _Leaf(shape, np.dtype(np.int8), sharding and sharding.qvalue)
        self._scales = _Leaf(
            (*layers, 1, outputs), np.dtype(np.float32), sharding and sharding.scale
        )

    def copies(self, view: np.ndarray, row: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from pixart_jax.models import quantization

        values, scale = quantization.quantize_matrix(np.ascontiguousarray(view.T))
        yield from self._values.copies(values, row)
        yield from self._scales.copies(scale, row)

    def put(self) -> object:
        from pixart_jax.models import quantization

        return quantization.leaf(self._values.put(), self._scales.put())


def _leaf_type(path: str, quantization: str | None) -> type[_Leaf] | type[_Int8Leaf]:
    if quantization:
        from pixart_jax.models.quantization import applies  # imports Qwix, 0.4 s

        if applies(path):
            return _Int8Leaf
    return _Leaf


def _slabs(out: np.ndarray, view: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Split both along the axis with the longest stride in the file."""
    if view.ndim == 0 or view.size <= _SLAB:
        yield out, view
        return
    axis = int(np.argmax(np.abs(view.strides)))
    rows = max(1, _SLAB * view.shape[axis] // view.size // _ROWS) * _ROWS
    for start in range(0, view.shape[axis], rows):
        part = (slice(None),) * axis + (slice(start, start + rows),)
        yield out[part], view[part]


def _copy(out: np.ndarray, view: np.ndarray) -> bool:
    """out[...] = view, cast; return whether all of it is finite.

    Goes a few rows at a time, which are checked while they are in the core's cache. A transposed
    matrix is cast and turned there: numpy's own copy misses the cache at every element.
    """
    good, out, view = True, np.atleast_1d(out), np.atleast_1d(view)
    with np.errstate(invalid="ignore", over="ignore"):  # is checked
        if view.ndim != 2 or abs(view.strides[0]) >= abs(view.strides[1]):
            step = max(1, _TILE * len(view) // max(1, view.size))
            for start in range(0, len(view), step):
                part = out[start : start + step]
                np.copyto(part, view[start : start + step], casting="unsafe")
                good &= finite.whole(part)
            return good
        rows, bits = view.T, np.dtype(f"u{out.itemsize}")  # numpy copies integers fastest
        for start in range(0, len(rows), _ROWS):
            tile = rows[start : start + _ROWS].astype(out.dtype)
            good &= finite.whole(tile)
            out.view(bits)[:, start : start + _ROWS] = tile.view(bits).T
    return good


def _put(buffers: Mapping[Index, np.ndarray], shape: tuple[int, ...], sharding) -> jax.Array:
    """The array of the parts in ``buffers``; CPU devices use the buffers in place."""
    if sharding is None:
        return jax.device_put(buffers[_whole(shape)], may_alias=True)
    arrays = []
    for device, index in _parts(shape, sharding).items():
        if index in buffers:
            part = buffers[index]
        else:
            part = buffers[_whole(shape)][tuple(slice(*bounds) for bounds in index)]
        arrays.append(jax.device_put(part, device, may_alias=True))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _parts(shape: tuple[int, ...], sharding) -> dict[jax.Device, Index]:
    """{device of this process: its part of the array}."""
    return {
        device: tuple(part.indices(length)[:2] for part, length in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }


def _whole(shape: tuple[int, ...]) -> Index:
    return tuple((0, length) for length in shape)


def _buffer(shape: Iterable[int], dtype: np.dtype) -> np.ndarray:
    """An empty array in pages of its own: aligned, so that XLA's CPU devices can use it in place,
    and returned to the system when freed. numpy's huge pages take twice as long on first touch."""
    shape = tuple(shape)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)

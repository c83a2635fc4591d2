"""From a file to the devices, a parameter at a time: what is read is laid out, cast and put in its
place before the next is touched.

A stacked parameter is one buffer for each part of it that a device of this process holds; every
layer's tensor is copied into its row, axes and dtype changed on the way, by a few threads. Where
the device is the CPU the buffer itself becomes the array. Pages of the file are given back as soon
as they are copied. So the host holds, beside what lives on the devices, one parameter and what is
begun of the next, and one more where a copy to an accelerator is under way.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

from pixart_jax.weights.files import Tensors
from pixart_jax.weights.table import Match, ParamMapping, flatten, match, unflatten

# bytes: an array that begins at a multiple of it can be used by XLA's CPU devices where it lies
_ALIGNMENT = 64
_BLOCK = 1 << 17  # elements that are cast, or turned, at a time, in a core's cache
_SHORTEST = 32  # rows of the file's matrix that are turned at a time: a cache line of bfloat16
# of its columns: whole rows are cast fastest, fewer touch fewer pages of what is written
_LONGEST, _LONGEST_AS_IT_IS = 5120, 1152
_PADDING = 16
_SLAB = 1 << 23  # elements that one thread copies at a time
_THREADS = 8
_READ_AHEAD = 128 << 20  # bytes of the file that the system is asked for before they are copied
# bytes of the file that are given to the threads at a time, and two tensors where those are more
_UNDER_WAY = 48 << 20
_LARGE = 1 << 20  # bytes
_LONG = 3 << 30  # bytes; opening more shows a bar

Index = tuple[tuple[int, int], ...]  # (start, stop) along each axis


class ParamReader:
    """Our tree of jax arrays, to be read from a file's tensors; what of it can be told by names and
    shapes is checked at once.

    table, shapes, tensors, source, ignore, dtype, shardings, quantization: as :func:`read`, which
    also says what is raised.
    """

    def __init__(
        self,
        table: Iterable[ParamMapping],
        shapes: Mapping,
        tensors: Mapping[str, np.ndarray],
        *,
        source: str | None = None,
        ignore: Iterable[str] = (),
        dtype: Callable[[str], np.dtype] | np.dtype = np.float32,
        shardings: Mapping | None = None,
        quantization: str | None = None,
    ):
        self._tensors = tensors
        self._matches = match(
            table,
            shapes,
            _shapes(tensors),
            source=source or getattr(tensors, "source", "the file"),
            ignore=ignore,
        )
        self._shardings = {} if shardings is None else flatten(shardings)
        dtype_of = dtype if callable(dtype) and not isinstance(dtype, type) else lambda path: dtype
        self._held = {
            found.entry.path: np.dtype(dtype_of(found.entry.path)) for found in self._matches
        }
        self._quantized = set()
        if quantization:
            from pixart_jax.weights import quantization as quantized  # Qwix takes 0.4 s to import

            self._quantized = {path for path in self._held if quantized.applies(path)}

    @property
    def shapes(self) -> dict:
        """The tree of what is read, as jax.ShapeDtypeStruct."""
        return unflatten({found.entry.path: self._shape(found) for found in self._matches})

    def _shape(self, found: Match) -> object:
        path = found.entry.path
        sharding = self._shardings.get(path)
        if path not in self._quantized:
            return jax.ShapeDtypeStruct(found.shape, self._held[path], sharding=sharding)
        from pixart_jax.weights import quantization

        values = jax.ShapeDtypeStruct(found.shape, np.int8, sharding=sharding and sharding.qvalue)
        scales = jax.ShapeDtypeStruct(
            (*found.shape[:-2], 1, found.shape[-1]),
            np.float32,
            sharding=sharding and sharding.scale,
        )
        return quantization.leaf(values, scales)

    def read(self) -> dict:
        """The tree. A bar tells how far it is, of much."""
        total = sum(
            math.prod(found.shape) * self._held[found.entry.path].itemsize
            for found in self._matches
        )
        threads = max(1, min(_THREADS, os.cpu_count() or 1))
        with (
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
            tqdm(
                total=total,
                desc="opening",
                unit="B",
                unit_scale=True,
                disable=total < _LONG,
                leave=False,
            ) as bar,
        ):
            filling = _Filling(
                self._tensors, [name for found in self._matches for name in found.names], pool, bar
            )
            for found in self._matches:
                path = found.entry.path
                if path in self._quantized:
                    filling.quantized(found, self._shardings.get(path))
                else:
                    filling.parameter(found, self._held[path], self._shardings.get(path))
            filling.finish()
        return unflatten(filling.arrays)


def read(
    table: Iterable[ParamMapping], shapes: Mapping, tensors: Mapping[str, np.ndarray], **how
) -> dict:
    """Our tree of jax arrays, from a file's tensors.

    shapes: our tree of anything with .shape. tensors: a file of files.py, or {key: array}; source:
    its name in messages. dtype: of each parameter, or a function of its path. shardings: our tree
    of NamedSharding, or None for the default device. ignore: as table.match, which names all that
    does not fit, before anything is read. quantization "int8": kernels become int8 values and
    scales (quantization.py), a layer at a time; shapes and shardings then hold such a pair at a
    kernel's path.
    """
    return ParamReader(table, shapes, tensors, **how).read()


def map_params(tensors: Tensors, shardings: Mapping | None = None) -> dict:
    """Our tree from a file that holds it in our own layout and dtypes, under the names of
    :func:`leaves`: on a CPU's single device the arrays are the file's own pages, read when they are
    first used."""
    where = {} if shardings is None else leaves(shardings)
    out: dict[str, jax.Array] = {}
    for name in tensors:
        value = tensors[name]
        out[name] = _put({_whole(value.shape): value}, value.shape, where.get(name))
        if jax.default_backend() != "cpu":
            jax.block_until_ready(out[name])
            tensors.release(name)
    for name in [name for name in out if name.endswith("/qvalue")]:
        from pixart_jax.weights import quantization

        path = name.removesuffix("/qvalue")
        out[path] = quantization.leaf(out.pop(name), out.pop(f"{path}/scale"))
    return unflatten(out)


def leaves(tree: Mapping) -> dict[str, object]:
    """{'blocks/q/kernel': array} of every array of a tree; those of a quantised kernel are
    'blocks/q/kernel/qvalue' and '…/scale'."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _shapes(tensors: Mapping) -> dict[str, tuple[int, ...]]:
    shape = (
        tensors.shape if isinstance(tensors, Tensors) else lambda key: tuple(np.shape(tensors[key]))
    )
    return {key: shape(key) for key in tensors}


class _Pages:
    """The pages of the file's tensors, which are taken in this order: read some way ahead, given
    back behind."""

    def __init__(self, tensors: Mapping, order: Iterable[str]):
        self._order = iter(order)
        self._tensors = tensors
        self._ahead = 0  # bytes asked for and not yet taken
        self._prefetch = getattr(tensors, "prefetch", lambda key: None)
        self.release = getattr(tensors, "release", lambda key: None)

    def take(self, name: str) -> np.ndarray:
        """The next tensor; those after it are asked for."""
        tensor = np.asarray(self._tensors[name])
        while (
            self._ahead < tensor.nbytes + _READ_AHEAD
            and (coming := next(self._order, None)) is not None
        ):
            self._prefetch(coming)
            self._ahead += np.asarray(self._tensors[coming]).nbytes
        self._ahead -= tensor.nbytes
        return tensor


class _Array:
    """An array in the making: a buffer for each part of it that a device of this process holds."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding):
        self._shape, self._sharding = shape, sharding
        indices = {_whole(shape)} if sharding is None else set(_parts(shape, sharding).values())
        self._buffers = {
            index: _aligned([stop - start for start, stop in index], dtype) for index in indices
        }

    def copies(self, row: int | None, view: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(part of a buffer, what belongs there) of one row of a stacked array, or of a whole one:
        few enough elements each that threads share them evenly."""
        for index, buffer in self._buffers.items():
            if row is not None:
                (start, stop), index = index[0], index[1:]
                if not start <= row < stop:
                    continue
                buffer = buffer[row - start]
            yield from _slabs(buffer, view[tuple(slice(*bounds) for bounds in index)])

    def put(self) -> jax.Array:
        """The array on its devices; nothing is written to it any more."""
        return _put(self._buffers, self._shape, self._sharding)


class _Filling:
    """Arrays in the making, a tensor at a time: while the last copies of one are waited for, the
    threads have begun the next."""

    def __init__(
        self, tensors: Mapping, order: Iterable[str], pool: concurrent.futures.Executor, bar: tqdm
    ):
        self._pages, self._pool, self._bar = _Pages(tensors, order), pool, bar
        self._under_way: collections.deque[
            tuple[str, int, list[concurrent.futures.Future], Callable[[], None]]
        ] = collections.deque()
        self._bytes = 0  # of the tensors under way
        self._before: object = None
        self.arrays: dict[str, object] = {}

    def parameter(self, found: Match, dtype: np.dtype, sharding) -> None:
        """Begins one parameter, and waits for what was begun some way before."""
        array = _Array(found.shape, dtype, sharding)
        for row, name in enumerate(found.names):
            tensor = self._pages.take(name)
            jobs = array.copies(row if found.entry.stacked else None, found.entry.view(tensor))
            last = row == len(found.names) - 1
            done = (
                functools.partial(self._put, found.entry.path, array.put) if last else lambda: None
            )
            self._under_way.append(
                (name, tensor.nbytes, [self._pool.submit(_copy, *job) for job in jobs], done)
            )
            self._bytes += tensor.nbytes
            while self._bytes > _UNDER_WAY and len(self._under_way) > 1:
                self._finish_one()

    def quantized(self, found: Match, sharding) -> None:
        """One kernel as int8 values and scales, quantised from the file's own numbers, a layer at a
        time."""
        from pixart_jax.weights import quantization

        self.finish()
        *layers, inputs, outputs = found.shape
        values = _Array((*layers, inputs, outputs), np.dtype(np.int8), sharding and sharding.qvalue)
        scales = _Array((*layers, 1, outputs), np.dtype(np.float32), sharding and sharding.scale)
        for row, name in enumerate(found.names):
            at = row if found.entry.stacked else None
            ours = quantization.quantize_matrix(
                np.ascontiguousarray(found.entry.view(self._pages.take(name)).T)
            )
            jobs = [
                job
                for array, part in zip((values, scales), ours, strict=True)
                for job in array.copies(at, part)
            ]
            for copied in [self._pool.submit(_copy, *job) for job in jobs]:
                copied.result()
            self._pages.release(name)
        self._put(found.entry.path, lambda: quantization.leaf(values.put(), scales.put()))

    def finish(self) -> None:
        """Waits for all that was begun."""
        while self._under_way:
            self._finish_one()
        jax.block_until_ready(self._before)

    def _finish_one(self) -> None:
        name, size, copies, done = self._under_way.popleft()
        for copied in copies:
            copied.result()
        self._pages.release(name)
        self._bytes -= size
        done()

    def _put(self, path: str, put: Callable[[], object]) -> None:
        # a copy to an accelerator keeps its buffer: one such at a time
        jax.block_until_ready(self._before)
        self._before = self.arrays[path] = put()
        self._bar.update(sum(leaf.nbytes for leaf in jax.tree.leaves(self._before)))


def _slabs(out: np.ndarray, view: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts both along the axis on which their file is longest strided, so that each slab reads one
    run of it."""
    if view.ndim == 0 or view.size <= _SLAB:
        yield out, view
        return
    axis = int(np.argmax(np.abs(view.strides)))
    rows = max(1, _SLAB * view.shape[axis] // view.size // _SHORTEST) * _SHORTEST
    for start in range(0, view.shape[axis], rows):
        cut = (slice(None),) * axis + (slice(start, start + rows),)
        yield out[cut], view[cut]


def _cast(out: np.ndarray, view: np.ndarray) -> None:
    """out[...] = view, of one shape. fp32 is rounded to bfloat16 in integers, to nearest with ties
    to even, at twice the speed of the cast that numpy knows; a block with a NaN in it, which
    integers would get wrong, is left to that one."""
    if view.flags.c_contiguous and out.flags.c_contiguous:
        view, out = view.reshape(1, -1), out.reshape(1, -1)
    if (
        (view.dtype, out.dtype) != (np.float32, ml_dtypes.bfloat16)
        or view.ndim != 2
        or view.size == 0
    ):
        np.copyto(out, view, casting="unsafe")
        return
    rows, columns = view.shape
    wide = min(columns, _BLOCK)
    tall = min(rows, _BLOCK // wide)
    scratch = np.empty((tall, wide), np.uint32)
    for top, left in itertools.product(range(0, rows, tall), range(0, columns, wide)):
        cut = np.s_[top : top + tall, left : left + wide]
        floats = view[cut]
        if np.isnan(floats.min()):
            np.copyto(out[cut], floats, casting="unsafe")
            continue
        bits, rounded = floats.view(np.uint32), scratch[: floats.shape[0], : floats.shape[1]]
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        np.copyto(out[cut].view(np.uint16), rounded, casting="unsafe")


def _copy(out: np.ndarray, view: np.ndarray) -> None:
    """out[...] = view, cast. A transposed matrix goes tile by tile through a scratch that fits a
    core's cache: numpy's own copy misses it at every element. The scratch's rows are padded, for
    rows a power of two apart would share a cache line's place."""
    if view.ndim != 2 or abs(view.strides[0]) >= abs(view.strides[1]):
        _cast(out, view)
        return
    theirs = view.T
    width = min(theirs.shape[1], _LONGEST_AS_IT_IS if view.dtype == out.dtype else _LONGEST)
    height = max(_SHORTEST, _BLOCK // max(width, 1) // _SHORTEST * _SHORTEST)
    bits = np.dtype(f"u{out.itemsize}")  # numpy moves its own types faster than ml_dtypes'
    target = out.view(bits)
    scratch = np.empty((height, width + _PADDING), out.dtype)
    for top in range(0, theirs.shape[0], height):
        for left in range(0, theirs.shape[1], width):
            tile = theirs[top : top + height, left : left + width]
            cast = scratch[: tile.shape[0], : tile.shape[1]]
            _cast(cast, tile)
            target[left : left + width, top : top + height] = cast.view(bits).T


def _put(buffers: Mapping[Index, np.ndarray], shape: tuple[int, ...], sharding) -> jax.Array:
    """The array whose parts lie in buffers, which nobody writes any more: a CPU device takes them
    as they are."""
    if sharding is None:
        return jax.device_put(buffers[_whole(shape)], may_alias=True)
    whole = buffers.get(_whole(shape))
    arrays = []
    for device, index in _parts(shape, sharding).items():
        part = (
            buffers[index] if index in buffers else whole[tuple(slice(*bounds) for bounds in index)]
        )
        arrays.append(jax.device_put(part, device, may_alias=True))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _parts(shape: tuple[int, ...], sharding) -> dict[jax.Device, Index]:
    """{device of this process: what it holds}."""
    return {
        device: tuple(part.indices(length)[:2] for part, length in zip(index, shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }


def _whole(shape: tuple[int, ...]) -> Index:
    return tuple((0, length) for length in shape)


def _aligned(shape: Iterable[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that XLA's CPU devices can use where it lies. A large one is mapped by itself,
    in ordinary pages: numpy asks for huge ones, whose first touch takes twice as long on a virtual
    machine, and gives nothing back to the system for a while."""
    shape = tuple(shape)
    size = math.prod(shape) * dtype.itemsize
    if size >= _LARGE:
        return (
            np.frombuffer(
                mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8
            )
            .view(dtype)
            .reshape(shape)
        )
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)

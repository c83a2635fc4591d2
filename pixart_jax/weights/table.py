"""A table of names: which parameter of ours is which tensor of a released file, and how its axes
lie.

Each model has one table a format (weights/transformer.py, weights/t5.py, weights/vae.py). A table
is a tuple of :class:`Entry`; reading and writing are the same walk in two directions, so what is
read can be written back to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.parallel.gather import gather_to_host

_LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    # name: (their axes → ours, ours → theirs)
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),  # [out, in] ↔ [in, out]
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW ↔ HWIO
    # 1×1 convolution ↔ [in, out]
    "pointwise": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
}


@dataclasses.dataclass(frozen=True)
class ParamMapping:
    """One parameter.

    ours: path in our tree, joined by '/'. theirs: key in the file; '{i}' in it means that ours is
    stacked over a leading layer axis, filled in place layer by layer. layout: a key of _LAYOUTS.
    part: (k, n) takes the k-th of n equal parts of theirs along its first axis (a fused qkv).
    optional: may be absent from the file (then absent from the tree).
    layers: the layers that a stacked parameter is of, in order, where not every layer has it; None:
    0, 1, 2 …
    """

    path: str
    key: str
    layout: str = "same"
    part: tuple[int, int] = (0, 1)
    optional: bool = False
    layers: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        return "{i}" in self.key

    def names(self, length: int) -> list[str]:
        """Their keys, one for each row of a stacked parameter of ``length`` rows; the one key of
        any other."""
        if not self.stacked:
            return [self.key]
        return [
            self.key.format(i=i) for i in (range(length) if self.layers is None else self.layers)
        ]

    def view(self, theirs: np.ndarray) -> np.ndarray | None:
        """This parameter's part of their tensor with its axes as ours, not copied; None where it
        has other axes than the layout takes."""
        part, parts = self.part
        if parts > 1:
            if theirs.ndim == 0 or theirs.shape[0] % parts:
                return None
            rows = theirs.shape[0] // parts
            theirs = theirs[part * rows : (part + 1) * rows]
        try:
            return _LAYOUTS[self.layout][0](theirs)
        except (ValueError, IndexError):
            return None


def flatten(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """Nested dict → {'a/b/c': leaf}."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, object]) -> dict:
    """{'a/b/c': leaf} → nested dict."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


class Match(NamedTuple):
    """A parameter and where it is found: its entry, its shape in our tree, and its tensors' keys,
    one a row where it is stacked."""

    entry: ParamMapping
    shape: tuple[int, ...]
    names: list[str]


def match(
    table: Iterable[ParamMapping],
    shapes: Mapping,  # our tree of anything with .shape (jax.eval_shape of init)
    theirs: Mapping[str, tuple[int, ...]],  # {key: shape} of the file
    *,
    source: str,
    ignore: Iterable[str] = (),
) -> list[Match]:
    """Every parameter with its tensors, in the table's order; optional ones that the file lacks are
    left out.

    ignore: keys that released files hold and no model needs. Raises UserError that names every
    missing and left-over key at once, or else every wrongly shaped one; keys that differ in the
    layer alone are named together ("blocks.[0-27].mlp.fc1.weight").
    """
    table, shapes = list(table), flatten(shapes)
    matches = []
    for entry in table:
        if entry.path in shapes:
            shape = tuple(shapes[entry.path].shape)
            matches.append(Match(entry, shape, entry.names((*shape, 1)[0])))
    wanted = {name for found in matches for name in found.names}
    needed = {name for found in matches if not found.entry.optional for name in found.names}
    problems = []
    for what, names in (
        ("missing", needed - theirs.keys()),
        ("left over", theirs.keys() - wanted - set(ignore)),
        ("without a name in the table", shapes.keys() - {entry.path for entry in table}),
    ):
        if names:
            problems.append(f"{len(names)} {what}: {', '.join(grouped(names))}")
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")

    matches = [found for found in matches if all(name in theirs for name in found.names)]
    wrong: dict[str, list[str]] = {}
    for entry, shape, names in matches:
        want = shape[1:] if entry.stacked else shape
        for name in names:
            view = entry.view(np.broadcast_to(np.empty((), np.int8), theirs[name]))
            if view is None or view.shape != want:
                wrong.setdefault(f"{tuple(theirs[name])} for {entry.path} {want}", []).append(name)
    if wrong:
        listed = "; ".join(f"{', '.join(grouped(names))} {what}" for what, names in wrong.items())
        raise UserError(f"{source} does not fit the model: wrong shape: {listed}")
    return matches


def grouped(names: Iterable[str]) -> list[str]:
    """Names in order, those that differ in their first number alone as one: a.0.b, a.1.b, a.3.b →
    a.[0-1,3].b."""
    groups: dict[tuple[str, str], list[int]] = {}
    plain = []
    for name in names:
        found = re.fullmatch(r"(.*?\.)(\d+)((?:\..*)?)", name)
        if found:
            groups.setdefault((found[1], found[3]), []).append(int(found[2]))
        else:
            plain.append(name)
    for (before, after), numbers in groups.items():
        numbers = sorted(set(numbers))
        starts = [n for n in numbers if n - 1 not in numbers]
        ends = [n for n in numbers if n + 1 not in numbers]
        ranges = ",".join(
            str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)
        )
        plain.append(f"{before}{ranges if len(numbers) == 1 else f'[{ranges}]'}{after}")
    return sorted(plain)


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor of a file to be written: its shape and dtype are known, its values are made when
    they are asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        value = self.make()
        return value if dtype is None else value.astype(dtype, copy=False)


def write(table: Iterable[ParamMapping], params: Mapping) -> dict[str, LazyTensor]:
    """Our tree → {their key: tensor}, the inverse of reading, to the bit. One is made at a time, so
    a whole copy is never held.

    Of a stack of layers that lies over a mesh one layer is gathered for its tensor
    (parallel.gather.on_host).
    """
    flat = flatten(params)
    pieces: dict[str, dict[int, tuple[ParamMapping, int]]] = {}
    for entry in table:
        if entry.path in flat:
            for row, key in enumerate(entry.names((*flat[entry.path].shape, 1)[0])):
                pieces.setdefault(key, {})[entry.part[0]] = (entry, row)

    def make(key: str) -> np.ndarray:
        arrays = []
        for _, (entry, row) in sorted(pieces[key].items(), key=lambda item: item[0]):
            arrays.append(
                _LAYOUTS[entry.layout][1](
                    gather_to_host(flat[entry.path], row if entry.stacked else None)
                )
            )
        return np.ascontiguousarray(arrays[0]) if len(arrays) == 1 else np.concatenate(arrays)

    def shape(entry: ParamMapping) -> tuple[int, ...]:
        ours = flat[entry.path].shape[1:] if entry.stacked else flat[entry.path].shape
        return _LAYOUTS[entry.layout][1](np.broadcast_to(np.empty((), np.int8), ours)).shape

    out = {}
    for key, parts in pieces.items():
        shapes = [shape(entry) for entry, _ in parts.values()]
        whole = (
            shapes[0]
            if len(shapes) == 1
            else (sum(length for length, *_ in shapes), *shapes[0][1:])
        )
        out[key] = LazyTensor(
            whole,
            np.dtype(flat[next(iter(parts.values()))[0].path].dtype),
            functools.partial(make, key),
        )
    return out

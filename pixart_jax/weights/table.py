"""Tables that map our parameters to the tensors of released files, and their axes.

Each model has one table per format (weights/transformer.py, dit.py, t5.py, vae.py), a tuple of
:class:`ParamMapping`. One table serves reading and writing, so files round-trip to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from pixart_jax import finite
from pixart_jax.errors import UserError
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.weights.files import LazyTensor

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

    path: in our tree, joined by '/'. key: in the file; with '{i}' in it the parameter is stacked
    over a leading layer axis. layout: a key of _LAYOUTS. part: (k, n) is the k-th of n equal parts
    of the file's tensor along its first axis (a fused qkv). optional: may be absent from the file,
    and is then absent from the tree. layers: those that have a stacked parameter; None: 0, 1, 2 …
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
        """The keys in the file: one per row of a stacked parameter of ``length`` rows, else one."""
        if not self.stacked:
            return [self.key]
        layers = range(length) if self.layers is None else self.layers
        return [self.key.format(i=i) for i in layers]

    def view(self, theirs: np.ndarray) -> np.ndarray | None:
        """A view of this parameter's part of the file's tensor with our axes; None where the tensor
        does not have the layout's axes."""
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


def layer(
    path: str, name: str, layout: str = "linear", part: tuple[int, int] = (0, 1)
) -> tuple[ParamMapping, ParamMapping]:
    """Kernel and bias of a linear layer or a convolution."""
    return (
        ParamMapping(f"{path}/kernel", f"{name}.weight", layout, part),
        ParamMapping(f"{path}/bias", f"{name}.bias", "same", part),
    )


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dict → {'a/b/c': leaf}."""
    flat: dict[str, Any] = {}
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
    """A parameter, its shape in our tree, and the keys of its tensors, one per row if stacked."""

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
    """Every parameter with its tensors, in the table's order, without optional ones that the file
    lacks.

    ignore: keys that files may hold and no model needs. The UserError names all missing and
    left-over keys, or else all wrong shapes, at once; keys of several layers are grouped
    ("blocks.[0-27].mlp.fc1.weight").
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
    for what, keys in (
        ("missing", needed - theirs.keys()),
        ("left over", theirs.keys() - wanted - set(ignore)),
        ("without a name in the table", shapes.keys() - {entry.path for entry in table}),
    ):
        if keys:
            problems.append(f"{len(keys)} {what}: {', '.join(grouped(keys))}")
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")

    matches = [found for found in matches if all(name in theirs for name in found.names)]
    wrong: dict[str, list[str]] = {}
    for entry, shape, names in matches:
        want = shape[1:] if entry.stacked else shape
        for name in names:
            view = entry.view(np.broadcast_to(np.int8(0), theirs[name]))
            if view is None or view.shape != want:
                wrong.setdefault(f"{tuple(theirs[name])} for {entry.path} {want}", []).append(name)
    if wrong:
        listed = "; ".join(f"{', '.join(grouped(names))} {what}" for what, names in wrong.items())
        raise UserError(f"{source} does not fit the model: wrong shape: {listed}")
    return matches


def grouped(names: Iterable[str]) -> list[str]:
    """Sorted names, grouped by their first number: a.0.b, a.1.b, a.3.b → a.[0-1,3].b."""
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


def write(table: Iterable[ParamMapping], params: Mapping) -> dict[str, LazyTensor]:
    """Our tree → {key in the file: tensor}, the inverse of reading, to the bit.

    Values are gathered to the host (parallel.gather) when a tensor is written, of a stack one layer
    at a time, so no host holds a second copy of the parameters. UserError for one not finite.
    """
    flat = flatten(params)
    parts_of: dict[str, list[tuple[ParamMapping, int | None]]] = {}
    for entry in sorted(table, key=lambda entry: entry.part[0]):
        if entry.path in flat:
            for row, key in enumerate(entry.names((*flat[entry.path].shape, 1)[0])):
                parts_of.setdefault(key, []).append((entry, row if entry.stacked else None))

    def values(key: str) -> Iterator[np.ndarray]:
        for entry, row in parts_of[key]:
            value = finite.check_tensor(key, gather_to_host(flat[entry.path], row))
            yield _LAYOUTS[entry.layout][1](value)

    def shape(key: str) -> tuple[int, ...]:
        shapes = []
        for entry, _ in parts_of[key]:
            ours = flat[entry.path].shape[1 if entry.stacked else 0 :]
            shapes.append(_LAYOUTS[entry.layout][1](np.broadcast_to(np.int8(0), ours)).shape)
        return (sum(length for length, *_ in shapes), *shapes[0][1:]) if shapes[1:] else shapes[0]

    return {
        key: LazyTensor(
            shape(key), np.dtype(flat[parts[0][0].path].dtype), functools.partial(values, key)
        )
        for key, parts in parts_of.items()
    }

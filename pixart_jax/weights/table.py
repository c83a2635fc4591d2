"""A table of names: which parameter of ours is which tensor of a released file, and how its axes lie.

Each model has one table a format (weights/transformer.py, weights/t5.py, weights/vae.py). A table is a tuple of
:class:`Entry`; reading and writing are the same walk in two directions, so what is read can be written back to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from pixart_jax.errors import UserError

_LAYOUTS: dict[str, tuple[Callable, Callable]] = {
    # name: (their axes → ours, ours → theirs)
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),  # [out, in] ↔ [in, out]
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW ↔ HWIO
    "pointwise": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),  # 1×1 convolution ↔ [in, out]
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter.

    ours: path in our tree, joined by '/'. theirs: key in the file; '{i}' in it means that ours is stacked over a
    leading layer axis, filled in place layer by layer. layout: a key of _LAYOUTS. part: (k, n) takes the k-th of n equal
    parts of theirs along its first axis (a fused qkv). optional: may be absent from the file (then absent from the tree).
    layers: the layers that a stacked parameter is of, in order, where not every layer has it; None: 0, 1, 2 …
    """

    ours: str
    theirs: str
    layout: str = "same"
    part: tuple[int, int] = (0, 1)
    optional: bool = False
    layers: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs

    def names(self, length: int) -> list[str]:
        """Their keys, one for each row of a stacked parameter of ``length`` rows; the one key of any other."""
        if not self.stacked:
            return [self.theirs]
        return [self.theirs.format(i=i) for i in (range(length) if self.layers is None else self.layers)]


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


def read(
    table: Iterable[Entry],
    shapes: Mapping,  # our tree of anything with .shape (jax.eval_shape of init)
    keys: Iterable[str],
    tensor: Callable[[str], np.ndarray],
    *,
    source: str,
    dtype=np.float32,
    ignore: Iterable[str] = (),
    place: Callable[[str, np.ndarray], object] | None = None,
) -> dict:
    """Fill our tree from a file, one tensor at a time.

    keys: the names in the file; tensor(key) loads one. ignore: names that released files hold and no model needs.
    place(path, array): what to make of each parameter as soon as it is filled (put on a mesh); the array itself by default.
    Raises UserError that names every missing and left-over key at once, before any tensor is read, and then every wrongly
    shaped one at once.
    """
    table, keys, shapes = list(table), set(keys), flatten(shapes)
    wanted: dict[str, list[Entry]] = {}
    for entry in table:
        if entry.ours not in shapes:
            continue
        for name in entry.names((*shapes[entry.ours].shape, 1)[0]):
            wanted.setdefault(name, []).append(entry)
    optional = {k for k, uses in wanted.items() if all(entry.optional for entry in uses)}
    missing = sorted(k for k in wanted if k not in keys and k not in optional)
    left = sorted(k for k in keys if k not in wanted and k not in set(ignore))
    unmapped = sorted(set(shapes) - {e.ours for e in table})
    problems = []
    for what, names in (("missing", missing), ("left over", left), ("without a name in the table", unmapped)):
        if names:
            problems.append(f"{len(names)} {what}: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}")
    if problems:
        raise UserError(f"{source} does not fit the model: {'; '.join(problems)}")

    out: dict[str, object] = {}
    wrong = []
    for entry in table:  # parameter by parameter, so that the host holds one of them beside what is placed
        if entry.ours not in shapes:
            continue
        shape = tuple(shapes[entry.ours].shape)
        names = entry.names((*shape, 1)[0])
        if not all(name in keys for name in names):  # an optional one
            continue
        value = np.empty(shape, dtype)
        for i, name in enumerate(names):
            theirs = tensor(name)
            piece, want = _ours(entry, theirs), shape[1:] if entry.stacked else shape
            if piece is None or tuple(piece.shape) != want:
                wrong.append(f"{name} {tuple(theirs.shape)} for {entry.ours} {want}")
            else:
                value[i if entry.stacked else ...] = piece
        if not wrong:
            out[entry.ours] = place(entry.ours, value) if place else value
    if wrong:
        raise UserError(f"{source} does not fit the model: wrong shape: {'; '.join(wrong[:8])}{' …' if len(wrong) > 8 else ''}")
    return unflatten(out)


def _ours(entry: Entry, theirs: np.ndarray) -> np.ndarray | None:
    """An entry's part of their tensor with its axes as ours; None where it has other axes than the layout takes."""
    part, parts = entry.part
    if parts > 1:
        if theirs.ndim == 0 or theirs.shape[0] % parts:
            return None
        rows = theirs.shape[0] // parts
        theirs = theirs[part * rows : (part + 1) * rows]
    try:
        return _LAYOUTS[entry.layout][0](theirs)
    except (ValueError, IndexError):
        return None


def write(table: Iterable[Entry], params: Mapping) -> dict[str, np.ndarray]:
    """Our tree → {their key: array}, the inverse of :func:`read`, to the bit."""
    flat = {path: np.asarray(value) for path, value in flatten(params).items()}
    out: dict[str, np.ndarray] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for entry in table:
        if entry.ours not in flat:
            continue
        for row, key in enumerate(entry.names((*flat[entry.ours].shape, 1)[0])):
            value = flat[entry.ours][row] if entry.stacked else flat[entry.ours]
            value = np.ascontiguousarray(_LAYOUTS[entry.layout][1](value))
            if entry.part[1] == 1:
                out[key] = value
            else:
                parts.setdefault(key, {})[entry.part[0]] = value
    for key, pieces in parts.items():
        out[key] = np.concatenate([pieces[k] for k in sorted(pieces)])
    return out

"""What a compiled program sends between devices: each collective with its bytes, its count and the
mesh axes that it runs over.

A collective inside a loop counts as often as the loop runs; an asynchronous one once, though its
start, its steps and its end may each name it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from pixart_jax.planning import hlo

KINDS = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"}
KINDS |= {"collective-permute", "collective-broadcast"}
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"  # noqa: E501
)
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{} ]*\})?\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{} ]*\})\}")
_CHAIN = re.compile(r'chain_id="?(\d+)')
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes in one execution of the program.

    axes: of the mesh along which the group lies. group: devices. bytes: of the complete (gathered
    or reduced) arrays, per device. moved: bytes that a device sends with the ring algorithm:
    (g − 1) / g of bytes, twice that for an all-reduce, all of them for a permutation.
    asynchronous: whether the program does other work meanwhile. links: one-way links of the torus
    that a device has along these axes (2 for a dimension that closes to a ring, 1 for a line), 1
    for a switch, 0 within a chip. networks: slices or hosts that the group spans.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: float
    bytes: float
    moved: float
    asynchronous: bool
    links: int = 1
    networks: int = 1


def collectives(text: str, axes: Sequence[str], sizes: Sequence[int]) -> list[Collective]:
    """Those of ``compiled.as_text()``, the largest first, on a mesh in the devices' order."""
    totals: dict[tuple, list[float]] = {}
    for run, i in _started(text):
        kind, started = i.opcode.removesuffix("-start"), i.opcode.endswith("-start")
        group, names = _groups(i.rest, axes, sizes)
        if group == 1:
            continue
        alone = all(other.opcode in ("parameter", *KINDS) for other in run.instructions)
        asynchronous = (
            started
            or alone  # what an async-start calls
            or _CHAIN.search(i.rest) is not None
            or 'async_collective_name="' in i.rest
        ) and '"is_sync":true' not in i.rest
        size: float = _bytes(kind, i.arrays, started)
        if kind == "reduce-scatter":
            size *= group  # its shape is that of the part
        elif kind == "all-reduce" and run.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPU: an all-reduce whose result is sliced in the same fusion
        total = totals.setdefault((kind, names, group, asynchronous), [0.0, 0.0])
        total[0] += run.times
        total[1] += run.times * size
    found = []
    for (kind, names, group, asynchronous), (count, size) in totals.items():
        share = (2.0 if kind == "all-reduce" else 1.0) * (group - 1) / group
        if kind in ("collective-permute", "collective-broadcast"):
            share = 1.0
        found.append(Collective(kind, names, group, count, size, share * size, asynchronous))
    return sorted(found, key=lambda c: -c.moved)


def _started(text: str) -> Iterator[tuple[hlo.Run, hlo.Instruction]]:
    """Every collective with the run that starts it.

    On a TPU an asynchronous one is a chain of pieces fused into the work that hides it, some inside
    a loop that runs meanwhile. The piece that runs least often gives the count.
    """
    chains: dict[tuple, tuple[hlo.Run, hlo.Instruction]] = {}
    for run in hlo.executed(text):
        for i in run.instructions:
            if i.opcode.removesuffix("-start") not in KINDS:
                continue
            chain, channel = _CHAIN.search(i.rest), _CHANNEL.search(i.rest)
            if chain is None:
                yield run, i
                continue
            key = (i.opcode.removesuffix("-start"), chain[1], channel and channel[1])
            if key not in chains or run.times < chains[key][0].times:
                chains[key] = (run, i)
    yield from chains.values()


def _bytes(kind: str, arrays: list[int], started: bool) -> int:
    """Bytes of the results. The shape of a started one is (operands, results, …), but an
    all-reduce's is that of the results."""
    if not started or kind == "all-reduce" or len(arrays) == 1:
        return sum(arrays)
    return arrays[1] if kind == "collective-permute" else sum(arrays[len(arrays) // 2 :])


def _groups(rest: str, axes: Sequence[str], sizes: Sequence[int]) -> tuple[int, tuple[str, ...]]:
    """(devices of a group, the axes along which they differ)."""
    pairs = _PAIRS.search(rest)
    members = _numbers(pairs[1]) if pairs else replica_groups(rest, math.prod(sizes))
    if members.size == 0:
        return 1, ()
    where = np.stack(np.unravel_index(members, tuple(sizes)), -1)  # [groups, members, axes]
    differ = (where != where[:, :1]).any((0, 1))
    group = members.shape[1] if not pairs else 2 if differ.any() else 1
    return group, tuple(name for name, d in zip(axes, differ) if d)


def replica_groups(rest: str, devices: int) -> np.ndarray:
    """The groups of an instruction's text, [groups, members], in XLA's three forms."""
    if mesh := _MESH_GROUPS.search(rest):
        return _mesh_groups(*mesh.groups())
    if iota := _IOTA_GROUPS.search(rest):
        return _iota(iota[2], iota[3]).reshape(_ints(iota[1]))
    listed = _LISTED_GROUPS.search(rest)
    return _numbers(listed[1]) if listed and listed[1] else np.arange(devices)[None]


def _mesh_groups(mesh: str, shape: str | None, order: str | None, along: str) -> np.ndarray:
    """mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}: devices in the mesh's shape; a group runs
    along the named axes. One may be a part of an axis, 'a':(2)2: of 4 the factor 2 after a factor
    2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    shape = shape or str(math.prod(sizes.values()))
    ids, names = _iota(shape, order).reshape(-1), list(sizes)
    places = np.stack(np.unravel_index(np.arange(len(ids)), tuple(sizes.values())))
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along):
        length = int(part or sizes[name])
        stride = sizes[name] // (int(before or 1) * length)
        place = places[names.index(name)]
        place -= place // stride % length * stride  # now alike within a group
    groups = np.ravel_multi_index(tuple(places), tuple(sizes.values()))
    return ids[np.argsort(groups, kind="stable")].reshape(len(np.unique(groups)), -1)


def _iota(shape: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return numbers.transpose(_ints(order)) if order else numbers


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n.strip()]


def _numbers(text: str) -> np.ndarray:
    """'{0,1},{2,3}' → [[0, 1], [2, 3]]."""
    return np.array([_ints(group) for group in re.findall(r"\{([\d, ]*)\}", text)])

"""What a compiled program sends between devices: each collective with its bytes, its count and the
mesh axes that it runs over.

Read from the optimised program, so it is what will run. A collective inside a loop counts as often
as the loop turns; an asynchronous one once, though its start, its steps and its end may each name
it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from pixart_jax.planning import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

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

    axes: names of the mesh axes in whose direction the groups lie, () where each device is alone.
    group: devices of a group.
    count: how many run. bytes: of the whole (gathered, or reduced) arrays, a device. moved: bytes
    that a device sends by the ring
    algorithm: (g − 1) / g of bytes, twice that for an all-reduce, all of them for a permutation.
    asynchronous: whether the program does other work meanwhile.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    count: float
    bytes: float
    moved: float
    asynchronous: bool


def collectives(text: str, axes: Sequence[str], sizes: Sequence[int]) -> list[Collective]:
    """Those of ``compiled.as_text()`` on a mesh of these axes, the largest first; devices are
    numbered in the mesh's order."""
    totals: dict[tuple, list[float]] = {}
    for run, instruction in _once(text):
        kind = instruction.opcode.removesuffix("-start")
        chain = _CHAIN.search(instruction.rest)
        started = instruction.opcode.endswith("-start")
        asynchronous = (
            chain is not None
            or started
            or _wrapped(run)
            or 'async_collective_name="' in instruction.rest
        )
        if '"is_sync":true' in instruction.rest:
            asynchronous = False
        whole = _whole(kind, instruction, started)
        if kind == "all-reduce" and run.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # TPU: an all-reduce whose result is cut in the same fusion
        group, names = _groups(instruction.rest, axes, sizes)
        if group == 1:
            continue
        if kind == "reduce-scatter" and instruction.opcode.startswith("reduce-scatter"):
            whole *= group  # its shape is that of the part
        entry = totals.setdefault((kind, names, group, asynchronous), [0.0, 0.0])
        entry[0] += run.times
        entry[1] += run.times * whole
    found = [
        Collective(kind, names, group, count, total, total * _share(kind, group), asynchronous)
        for (kind, names, group, asynchronous), (count, total) in totals.items()
    ]
    return sorted(found, key=lambda c: -c.moved)


def _once(text: str) -> Iterator[tuple[hlo.Run, hlo.Instruction]]:
    """Every collective that is started, with the run that starts it.

    On a TPU an asynchronous one is a chain of pieces fused into the work that hides it, some inside
    a loop that turns meanwhile; all bear the chain's number, and the piece that runs least often
    says how often the chain does.
    """
    chains: dict[tuple, tuple[hlo.Run, hlo.Instruction]] = {}
    for run in hlo.executed(text):
        for instruction in run.instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            chain = _CHAIN.search(instruction.rest)
            if chain is None:
                yield run, instruction
                continue
            channel = _CHANNEL.search(instruction.rest)
            identity = (kind, chain[1], channel and channel[1])
            if identity not in chains or run.times < chains[identity][0].times:
                chains[identity] = (run, instruction)
    yield from chains.values()


def _share(kind: str, group: int) -> float:
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (group - 1) / group


def _wrapped(run: hlo.Run) -> bool:
    """Whether the computation is what an async-start calls: it holds the collective and nothing
    else."""
    return all(i.opcode == "parameter" or i.opcode in KINDS for i in run.instructions)


def _whole(kind: str, instruction: hlo.Instruction, started: bool) -> int:
    """Bytes of the results; a started one's shape is (operands, results, more), an all-reduce's the
    results alone."""
    arrays = instruction.arrays
    if not started or kind == "all-reduce":
        return sum(arrays)
    if kind == "collective-permute":
        return arrays[1]
    return sum(arrays) - sum(arrays[: len(arrays) // 2]) if len(arrays) > 1 else sum(arrays)


def _groups(rest: str, axes: Sequence[str], sizes: Sequence[int]) -> tuple[int, tuple[str, ...]]:
    """(devices of a group, names of the axes along which they differ)."""
    pairs = _PAIRS.search(rest)
    if pairs:
        members = np.array(_numbers(pairs[1]))
    else:
        members = replica_groups(rest, math.prod(sizes))
    if members.size == 0:
        return 1, ()
    where = np.stack(np.unravel_index(members, tuple(sizes)), -1)  # [groups, members, axes]
    differ = (where != where[:, :1]).any((0, 1))
    return (2 if pairs and differ.any() else members.shape[1] if not pairs else 1), tuple(
        n for n, d in zip(axes, differ) if d
    )


def replica_groups(rest: str, devices: int) -> np.ndarray:
    """The groups of an instruction's text, [groups, members] device numbers, in each of the three
    forms that XLA writes."""
    mesh = _MESH_GROUPS.search(rest)
    if mesh:
        return _mesh_groups(*mesh.groups())
    iota = _IOTA_GROUPS.search(rest)
    if iota:
        groups, shape = (tuple(map(int, part.split(","))) for part in iota.groups()[:2])
        return _iota(shape, iota[3]).reshape(groups)
    listed = _LISTED_GROUPS.search(rest)
    if listed and listed[1]:
        return np.array(_numbers(listed[1]))
    return np.arange(devices)[None]


def _iota(shape: tuple[int, ...], order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose(tuple(map(int, order.split(",")))) if order else numbers


def _mesh_groups(mesh: str, shape: str | None, order: str | None, along: str) -> np.ndarray:
    """mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}: devices in the mesh's shape; a group runs
    along the named axes, of which one may be a part of an axis, 'a':(2)2: of the axis's 4 the
    factor 2 that follows a factor of 2."""
    named = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)]
    sizes = [size for _, size in named]
    ids = (
        np.arange(math.prod(sizes))
        if shape is None
        else _iota(tuple(map(int, shape.split(","))), order).reshape(-1)
    )
    parts: list[tuple[str, int]] = []  # axes split where a part of one is named
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    chosen = set()
    for name, size in named:
        cuts = [
            (int(before), int(part)) for other, before, part in wanted if other == name and before
        ]
        whole = any(other == name and not before for other, before, _ in wanted)
        edges = sorted({1, size, *(b for b, _ in cuts), *(b * p for b, p in cuts)})
        for low, high in zip(edges, edges[1:]) if size > 1 else [(1, 1)]:
            if whole or any(b <= low and high <= b * p for b, p in cuts):
                chosen.add(len(parts))
            parts.append((name, high // low))
    grid = ids.reshape([size for _, size in parts])
    order_ = [i for i in range(len(parts)) if i not in chosen] + sorted(chosen)
    members = math.prod(parts[i][1] for i in chosen)
    return grid.transpose(order_).reshape(-1, members)


def _numbers(text: str) -> list[list[int]]:
    """'{0,1},{2,3}' → [[0, 1], [2, 3]]."""
    return [
        [int(n) for n in group.split(",") if n.strip()]
        for group in re.findall(r"\{([\d, ]*)\}", text)
    ]

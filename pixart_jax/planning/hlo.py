"""Reader of a compiled program's text: its computations, and how often each runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{\s*$")
# The shape is a tuple in parentheses or a word: layouts, as {0:T(8,128)}, hold no blank.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-~]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-~]+)"
)
_LISTS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[su]\d+|bf16|f\d+\w*|c\d+)\[([\d,]*)\]")
_TRIPS = re.compile(r"known_trip_count\D+(\d+)")
_APPLIES_SCALARS = {
    "reduce", "all-reduce", "reduce-scatter", "scatter", "sort", "map", "reduce-window",
    "select-and-scatter",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name = shape opcode(rest: operands and attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def arrays(self) -> list[int]:
        """Bytes of each array of the shape, in order; one unless it is a tuple."""
        return [bytes_of(dtype, dims) for dtype, dims in _ARRAY.findall(self.shape)]

    @property
    def dims(self) -> tuple[int, ...]:
        """Of the first array of the shape."""
        return tuple(int(n) for n in _ARRAY.findall(self.shape)[0][1].split(",") if n)


@dataclasses.dataclass(frozen=True)
class Run:
    """times: in one run of the program. loop: the innermost while body, or "entry"."""

    computation: str
    instructions: list[Instruction]
    times: float
    loop: str


def bytes_of(dtype: str, dims: str) -> int:
    """'bf16', '2,1152' → bytes."""
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    return math.ceil(math.prod(int(n) for n in dims.split(",") if n) * bits / 8)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({name: instructions}, the entry's name) of ``compiled.as_text()``."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":  # a kernel's attributes may span lines and begin with }
            current = None
        elif current is not None and (parts := _INSTRUCTION.match(line)):
            current.append(Instruction(*parts.groups()))
    return found, entry


def executed(text: str) -> Iterator[Run]:
    """Every computation that the entry reaches, with how often it runs.

    A loop's body runs as often as the compiler states or its condition compares, else once. Every
    branch of a conditional counts, so there the result is an upper bound.
    """
    found, entry = computations(text)

    def walk(name: str, times: float, loop: str) -> Iterator[Run]:
        yield Run(name, found[name], times, loop)
        for instruction in found[name]:
            opcode, called = instruction.opcode, dict(_CALLED.findall(instruction.rest))
            if opcode in _APPLIES_SCALARS or opcode.endswith(("-update", "-done")):
                continue  # asynchronous instructions are counted where they start
            if opcode == "while":
                trips = _TRIPS.search(instruction.rest)
                count = int(trips[1]) if trips else _compared(found, called["condition"])
                yield from walk(called["body"], times * count, called["body"])
                continue
            lists = ",".join(_LISTS.findall(instruction.rest)).split(",")
            for other in [*called.values(), *(n.strip().lstrip("%") for n in lists)]:
                if other in found:
                    yield from walk(other, times, loop)

    yield from walk(entry, 1.0, "entry")


def _compared(found: dict[str, list[Instruction]], condition: str) -> int:
    """The constant that a loop's condition compares its counter with; 1 where there are several."""
    constants, todo = set(), [condition]
    while todo:
        for i in found.get(todo.pop(), []):
            if i.opcode == "constant" and re.match(r"[su](32|64)\[\]", i.shape):
                constants.add(int(i.rest.partition(")")[0]))
            todo += [name for _, name in _CALLED.findall(i.rest)]
    return max(*constants, 1) if len(constants) == 1 else 1

"""A compiled program's text read: its computations, and how often each runs in one execution."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-~]+) = (.+)$")
_OPCODE = re.compile(r"(?<![\w%.\-])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-~]+)"
)
_LISTS = re.compile(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[su]\d+|bf16|f\d+\w*|c\d+)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
_TRIPS = re.compile(r"known_trip_count\D+(\d+)")
_CONSTANT = re.compile(r"^[su](?:32|64)\[\]\S* constant\((\d+)\)")

_BITS = {"pred": 8}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """name = shape opcode(operands), attributes. shape: its text; rest: all behind the opcode's
    name."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def arrays(self) -> list[int]:
        """Bytes of each array of the shape, in order; one unless it is a tuple."""
        return [bytes_of(dtype, dims) for dtype, dims in _ARRAY.findall(self.shape)]


@dataclasses.dataclass(frozen=True)
class Run:
    """A computation as it is executed: times in one run of the program; loop: the innermost while
    body (or the entry) that it runs in."""

    computation: str
    instructions: list[Instruction]
    times: float
    loop: str


def bytes_of(dtype: str, dims: str) -> int:
    """'bf16', '2,1152' → bytes."""
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.ceil(math.prod(int(n) for n in dims.split(",") if n) * bits / 8)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({name: instructions}, the entry's name) of ``compiled.as_text()``."""
    found: dict[str, list[Instruction]] = {}
    entry = ""
    current: list[Instruction] | None = None
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        # attributes of a kernel run over lines, and one of those may begin so
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (parts := _INSTRUCTION.match(line)):
            shape, opcode, rest = _split(parts[2])
            current.append(Instruction(parts[1], shape, opcode, rest))
    return found, entry


def executed(text: str) -> Iterator[Run]:
    """Every computation that the entry reaches, with how often it runs.

    A loop's body runs as often as the compiler says or its condition compares; 1 where neither
    tells. Of a conditional every branch is taken to run, so what is counted is an upper bound
    there.
    """
    found, entry = computations(text)

    def walk(name: str, times: float, loop: str) -> Iterator[Run]:
        yield Run(name, found[name], times, loop)
        for instruction in found[name]:
            if instruction.opcode in (
                "reduce",
                "all-reduce",
                "reduce-scatter",
                "scatter",
                "sort",
                "map",
                "reduce-window",
                "select-and-scatter",
            ):
                continue  # what they apply is arithmetic on scalars
            if instruction.opcode.endswith(("-update", "-done")):
                continue  # counted where they start
            called = dict(_CALLED.findall(instruction.rest))
            if instruction.opcode == "while":
                trips = _TRIPS.search(instruction.rest)
                count = int(trips[1]) if trips else _compared(found, called["condition"])
                yield from walk(called["body"], times * count, called["body"])
                continue
            names = [
                n.strip().lstrip("%")
                for group in _LISTS.findall(instruction.rest)
                for n in group.split(",")
            ]
            for other in [*called.values(), *names]:
                if other in found:
                    yield from walk(other, times, loop)

    yield from walk(entry, 1.0, "entry")


def _split(text: str) -> tuple[str, str, str]:
    """'f32[2]{0} add(%a, %b), metadata=…' → (shape, opcode, rest); the shape may be a tuple of any
    depth."""
    start = text.find(" ")  # layouts, as {0:T(8,128)}, hold no blank
    if text.startswith("("):
        depth = 0
        for place, character in enumerate(text):
            depth += (character == "(") - (character == ")")
            if depth == 0:
                start = place
                break
    opcode = _OPCODE.search(text, start)
    if opcode is None:
        return text, "", ""
    return text[: opcode.start()], opcode[1], text[opcode.end() :]


def _compared(found: dict[str, list[Instruction]], condition: str) -> int:
    """The number that a loop's condition compares its counter with; 1 where it is not one
    constant."""
    constants = []
    todo = [condition]
    while todo:
        for instruction in found.get(todo.pop(), []):
            constant = _CONSTANT.match(
                f"{instruction.shape.strip()} {instruction.opcode}({instruction.rest}"
            )
            if constant:
                constants.append(int(constant[1]))
            todo += [name for _, name in _CALLED.findall(instruction.rest)]
    return max(constants[0], 1) if len(set(constants)) == 1 else 1


def rearranged(text: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """Copies and transposes, as written, of arrays of these shapes in any order of their
    dimensions, those of 1 left out.

    Not counted: copies to another memory of the same chip, which are asynchronous (copy-start),
    those of a broadcast, which is how a loop's sums begin at zero, and what a loop over stacked
    blocks does at each turn: it takes a slice out of the stack and puts one in.
    """
    wanted = {_outline(shape) for shape in shapes}
    found, seen = [], set()
    for run in executed(text):
        if run.computation in seen:
            continue
        seen.add(run.computation)
        made = {i.name: i.opcode for i in run.instructions}
        put = {
            name
            for i in run.instructions
            if i.opcode == "dynamic-update-slice"
            for name in _OPERAND.findall(i.rest)
        }
        for i in run.instructions:
            if i.opcode not in ("copy", "transpose") or i.name in put:
                continue
            (operand, *_), ((_, dims), *_) = _OPERAND.findall(i.rest), _ARRAY.findall(i.shape)
            shape = tuple(int(n) for n in dims.split(",") if n)
            if _outline(shape) in wanted and made.get(operand) not in (
                "broadcast",
                "dynamic-slice",
            ):
                found.append(f"{run.loop}: {i.name} = {i.shape.strip()} {i.opcode}({i.rest[:200]}")
    return found


def _outline(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))

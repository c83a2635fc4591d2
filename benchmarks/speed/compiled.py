"""What the compiler says: the largest batch whose step fits, and how long compiling takes."""

from __future__ import annotations

import bisect
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.speed.cases import Case
from benchmarks.speed.contest import Process
from benchmarks.speed.table import Record, render, tell
from pixart_jax.errors import UserError

LINES = 4  # measurements after which the bracket is halved
SHARE = 0.95  # of the device's memory that a program is given: allocators leave gaps
COLUMNS = ("work", "model", "px", "batch", "dtype", "cache", "compile or load s", "together s")


def largest(
    bytes_of: Callable[[int], float],
    limit: float,
    first: int = 32,
    unit: int = 8,
    maximum: int = 1 << 14,
) -> int:
    """The largest multiple of unit (or number below unit) up to maximum with bytes_of(batch) ≤
    limit; 0 where one sample does not fit.

    A bisection. Memory grows with the batch nearly along a straight line, so the first guesses lie
    where the line through the last two measurements meets the limit; bytes_of is called once a
    batch.
    """
    batches = [*range(1, unit), *range(unit, maximum + 1, unit)]
    known: list[tuple[int, float]] = []
    # places in batches: the largest known to fit, the least known not to
    low, high = -1, len(batches)
    guess = bisect.bisect(batches, first) - 1
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known.append((batches[guess], bytes_of(batches[guess])))
        low, high = (guess, high) if known[-1][1] <= limit else (low, guess)
        slope = 0.0
        if 2 <= len(known) <= LINES:
            (a, x), (b, y) = known[-2:]
            slope = (y - x) / (b - a)
        if slope > 0:
            guess = bisect.bisect(batches, a + (limit - x) / slope) - 1
        else:
            guess = (low + high) // 2 if high < len(batches) else 2 * guess + 1
    return batches[low] if low >= 0 else 0


def largest_batch(case: Case, remat: str, gib: float | None) -> Case:
    """The case with the largest batch on the device that jax finds, by the compiler's account,
    never by running out of memory; the first guess is the case's batch. gib: instead of the
    device's memory."""
    with tempfile.TemporaryDirectory() as scratch:
        process = Process("ours", Path(scratch))
        try:
            limit = SHARE * process.call("device_bytes") if gib is None else gib * 2**30
            if not limit:
                raise UserError("this device does not report its memory: give --memory GIB")

            def bytes_of(batch: int) -> float:
                at = dataclasses.replace(case, batch=batch)
                found = process.call("step_bytes", at, remat)
                tell(f"batch {batch}: {found / 2**30:.2f} of {limit / 2**30:.2f} GiB")
                return found

            found = largest(bytes_of, limit, case.batch, unit=min(8, case.batch))
        finally:
            process.end()
    if not found:
        raise UserError(f"{case}, remat {remat}: one sample does not fit")
    return dataclasses.replace(case, batch=found)


def compile_times(argv: Sequence[str], flags, measured: Sequence[tuple[Case, dict]]) -> int:
    """Each case in two fresh processes that share a cache folder, which the first finds empty;
    together: tracing and lowering too. Prints the table."""
    record = Record(flags.json, argv, columns=COLUMNS, cells=[], title="Compile time")
    for case, options in measured:
        name = ", ".join(f" {key} {value}" for key, value in options.items())
        name = f"train step,{name}" if case.kind == "train" else "sampler"
        with tempfile.TemporaryDirectory(prefix="compiled.") as cache:
            for start in ("cold", "warm"):
                process = Process("ours", Path(cache))
                seconds = process.call("compile_seconds", case, options)
                process.end()
                cells = [name, case.model, case.size, str(case.batch), case.dtype, start]
                record.run["cells"].append([*cells, *(f"{second:.2f}" for second in seconds)])
                tell(" | ".join(record.run["cells"][-1]))
                record.write()
    print(render(COLUMNS, record.run["cells"], "Compile time"), end="")
    return 0

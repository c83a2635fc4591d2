"""The largest batch whose train step fits a device: searched over what the compiler says of its
memory, never by running out of it."""

from __future__ import annotations

import bisect
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.speed.cases import Case
from pixart_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LINES = 4  # measurements after which the bracket is halved
SHARE = 0.95  # of the device's memory that a program is given: allocators leave gaps


def largest(
    bytes_of: Callable[[int], float],
    limit: float,
    first: int = 32,
    unit: int = 8,
    most: int = 1 << 14,
) -> int:
    """The largest multiple of unit (or number below unit) up to most with bytes_of(batch) ≤ limit;
    0 where one sample does not fit.

    A bisection. Memory grows with the batch nearly along a straight line, so the first guesses lie
    where the line through the last two measurements meets the limit; bytes_of is asked for no batch
    twice.
    """
    batches = [*range(1, unit), *range(unit, most + 1, unit)]
    known: list[tuple[int, float]] = []
    # places in batches: the largest known to fit, the least known not to
    low, high = -1, len(batches)
    guess = bisect.bisect(batches, first) - 1
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known.append((batches[guess], bytes_of(batches[guess])))
        low, high = (guess, high) if known[-1][1] <= limit else (low, guess)
        met = _on_the_line(known, limit) if len(known) <= LINES else None
        if met is not None:
            guess = bisect.bisect(batches, met) - 1
        else:
            guess = (low + high) // 2 if high < len(batches) else 2 * guess + 1
    return batches[low] if low >= 0 else 0


def _on_the_line(known: list[tuple[int, float]], limit: float) -> float | None:
    """Where the line through the last two measurements meets the limit; None where there is
    none."""
    if len(known) < 2:
        return None
    (a, x), (b, y) = known[-2:]
    slope = (y - x) / (b - a)
    return a + (limit - x) / slope if slope > 0 else None


def search(case: Case, remat: str, told: Callable[[str], None], memory: float | None = None) -> int:
    """The largest batch of the case on the device that jax finds; the batch that the case has is
    the first guess. memory: bytes, instead of what the device says it has."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.largest_batch",
        json.dumps(dataclasses.asdict(case)),
        remat,
    ]
    asked = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with asked:
        limit = float(asked.stdout.readline() or 0)
        limit = limit if memory is None else memory
        if not limit:
            raise UserError(
                "this device does not say how much memory it has: give --memory GIB, or a GPU"
            )

        def bytes_of(batch: int) -> float:
            asked.stdin.write(f"{batch}\n")
            asked.stdin.flush()
            found = float(asked.stdout.readline())
            told(f"batch {batch}: {found / 2**30:.2f} of {limit / 2**30:.2f} GiB")
            return found

        found = largest(bytes_of, limit, case.batch, unit=min(8, case.batch))
        asked.stdin.close()
    if not found:
        raise UserError(f"{case}, remat {remat}: one sample does not fit")
    return found


def main(case: Case, remat: str) -> None:
    """Says the limit, then for each batch that is asked for the bytes of its compiled step."""
    import jax

    from benchmarks.speed.ours import memory_of, traced_step

    stats = jax.devices()[0].memory_stats() or {}
    print(SHARE * stats.get("bytes_limit", 0), flush=True)
    # which kernels are fastest is not asked
    quick = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else None
    for line in sys.stdin:
        _, traced, _ = traced_step(dataclasses.replace(case, batch=int(line)), remat)
        print(memory_of(traced.lower().compile(compiler_options=quick))["all"], flush=True)


if __name__ == "__main__":
    main(Case(**json.loads(sys.argv[1])), sys.argv[2])

"""Contenders, a process each, take turns at a case; a row is what was measured of one of them.

By default all are open at once and run by turns, A B A B …, so that a machine that slows down slows
all of them. Where their memory does not fit together each runs alone, one after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.speed import inputs, machine, weights
from benchmarks.speed.cases import Case
from benchmarks.speed.table import tell
from pixart_jax.parallel.chips import chip_of

OURS = "pixart_jax"
# seconds before each turn: the threads of the last side spin for a while
REST = 0.25


@dataclasses.dataclass(frozen=True)
class Contender:
    """label: its name in tables. side: 'ours' or 'peer'. options: see ours.py and peer.py."""

    label: str
    side: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.side == "ours"


# ---- in a contender's process ----

_work: Any = None  # the open case: run(), result(output), facts
_held = 0  # resident bytes before it


def call(side: str, name: str, *arguments):
    """Call a function of a side's module, or of this one; an error becomes one line."""
    try:
        module = importlib.import_module(f"benchmarks.speed.{side}")
        if hasattr(module, name):
            return getattr(module, name)(*arguments)
        return globals()[name](module, *arguments)
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines() or [""]
        raise RuntimeError(f"{type(error).__name__}: {text[0]}") from None


def open_case(side, case: Case, options: dict, folder: str, arrays: dict) -> dict:
    """Open the weights and run once, which compiles; {'first_seconds', 'result', facts}."""
    global _work, _held
    machine.reset_peak()
    _held = machine.resident_bytes()
    _work = side.KINDS[case.kind](case, options, folder, arrays)
    begun = time.perf_counter()
    output = side.wait(_work.run())
    seconds = time.perf_counter() - begun
    return {"first_seconds": seconds, "result": _work.result(output), **_work.facts}


def timed_run(side) -> float:
    """Seconds of one run."""
    begun = time.perf_counter()
    side.wait(_work.run())
    return time.perf_counter() - begun


def close(side) -> int:
    """Forget the case; the peak bytes of the device, or on a CPU of the resident set over what the
    process held before the case."""
    global _work
    on_device = side.peak_device_bytes()
    peak = machine.peak_bytes() - _held if on_device is None else on_device
    _work = None
    side.forget()
    return peak


# ---- in the program ----


class Process:
    """A process of a side that calls functions there. compile_cache: where it keeps programs."""

    def __init__(self, side: str, compile_cache: Path):
        context = multiprocessing.get_context("spawn")
        self._side, self._pool = side, ProcessPoolExecutor(1, context, _answer_alone)
        self._env = {
            "HF_HUB_OFFLINE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(compile_cache / "inductor"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        }
        self.described = self.submit("described")

    def submit(self, name: str, *arguments):
        # the first submit starts the process, with the environment of this moment
        with mock.patch.dict(os.environ, self._env):
            return self._pool.submit(call, self._side, name, *arguments)

    def call(self, name: str, *arguments):
        return self.submit(name, *arguments).result()

    def end(self) -> None:
        self._pool.shutdown()


def _answer_alone() -> None:
    os.dup2(2, 1)  # libraries print to standard output, which is for the tables


class Contest:
    """A context that yields the rows of cases. flags: repeat (timed runs), budget (seconds of a
    case after which no round begins), keep (the same processes for all cases: faster, but ours then
    counts the device's memory from its first case on) and compile_cache (None: a fresh one, so that
    compile times are cold). alone: one contender at a time."""

    def __init__(self, contenders: Sequence[Contender], flags, alone: bool):
        self._contenders, self._flags, self._alone = contenders, flags, alone
        self._processes: dict[str, Process] = {}
        self.measured_limits: dict[str, dict] = {}  # dtype → {'ours', 'peer'} → limits
        self.machine: dict[str, str] = {}

    def __enter__(self):
        self._scratch = tempfile.TemporaryDirectory(prefix="speed.")
        self._compile_cache = self._flags.compile_cache or Path(self._scratch.name)
        return self

    def __exit__(self, *_):
        for label in list(self._processes):
            self._end(label)
        self._scratch.cleanup()

    def limits(self, dtype: str) -> dict[str, dict[str, float]]:
        """{'ours', 'peer'} → the machine's limits as that side measures them, once a contest."""
        if dtype not in self.measured_limits:
            self.measured_limits[dtype] = {}
            sides = {one.side: one for one in reversed(self._contenders)}.values()
            self._start(sides)
            for one in sides:
                with self._noting_failure(one):
                    self.measured_limits[dtype][one.side] = self._process(one).call("limits", dtype)
                if self._alone:
                    self._end(one.label)
        return self.measured_limits[dtype]

    def rows(self, case: Case) -> Iterator[dict]:
        """A row a contender. Ours comes first; errors and ratios are against it."""
        limits, folder, arrays = self.limits(case.dtype), weights.folder_of(case), inputs.make(case)
        found: dict[str, dict] = {one.label: {} for one in self._contenders}
        for group in [[one] for one in self._contenders] if self._alone else [self._contenders]:
            self._measure(group, (str(folder), arrays), case, found)
            first = next((found[one.label] for one in self._contenders if one.ours), {})
            for one in group:
                device = self.machine.get("device", "")
                yield row(case, one, found[one.label], first, limits, device)

    def _measure(self, group, opened: tuple, case: Case, found: dict[str, dict]) -> None:
        living, asked = list(group), {}
        self._start(group)
        for one in group:  # all are asked before the first has answered: they compile together
            with self._noting_failure(one, found, living):
                asked[one.label] = self._process(one).submit(
                    "open_case", case, one.options, *opened
                )
        for one in list(living):
            with self._noting_failure(one, found, living):
                found[one.label] = asked[one.label].result() | {"seconds": []}
                tell(f"{one.label}: first run {found[one.label]['first_seconds']:.2f} s")
        begun = time.perf_counter()
        for number in range(max(self._flags.repeat, 1)):
            if number and time.perf_counter() - begun > self._flags.budget:
                break
            for one in list(living):
                with self._noting_failure(one, found, living):
                    time.sleep(REST)
                    found[one.label]["seconds"].append(self._process(one).call("timed_run"))
        for one in list(living):
            with self._noting_failure(one, found, living):
                found[one.label]["peak_bytes"] = self._process(one).call("close")
                if self._alone or not self._flags.keep:
                    self._end(one.label)

    @contextlib.contextmanager
    def _noting_failure(
        self, one: Contender, found: dict | None = None, living: list | None = None
    ):
        """A contender that fails or dies has a failed row; the others go on."""
        try:
            yield
        except Exception as error:
            tell(f"{one.label}: {error}")
            self._end(one.label)
            if found is not None and living is not None:
                found[one.label] = {"failed": str(error)}
                living.remove(one)

    def _start(self, contenders: Iterable[Contender]) -> None:
        """Start their processes, all at the same time."""
        for one in contenders:
            if one.label not in self._processes:
                self._processes[one.label] = Process(one.side, self._compile_cache)

    def _process(self, one: Contender) -> Process:
        """The contender's process. RuntimeError where it does not run on the others' platform."""
        process = self._processes[one.label]
        described = process.described.result()
        known = self.machine.setdefault("platform", described["platform"])
        if known != described["platform"]:
            raise RuntimeError(f"{one.label} runs on {described['platform']}, not on {known}")
        if one.ours or "device" not in self.machine:
            self.machine["device"] = described["device"]
        return process

    def _end(self, label: str) -> None:
        if label in self._processes:
            self._processes.pop(label).end()


def relative_errors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Output → ‖ours − theirs‖ / ‖theirs‖; infinite where that is not finite."""
    found = {}
    for name in sorted(set(ours) & set(theirs)):
        a, b = np.asarray(ours[name], np.float64), np.asarray(theirs[name], np.float64)
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        found[name] = error if np.isfinite(error) else float("inf")
    return found


def row(
    case: Case, one: Contender, found: dict, ours: dict, limits: dict[str, dict], device: str
) -> dict:
    """What was measured of a contender, and the figures that follow from it. ours: what was
    measured of ours, without 'seconds' where it failed."""
    result = {"case": dataclasses.asdict(case), "size": case.size, "side": one.label}
    result["how"] = one.options
    if not found.get("seconds"):
        return result | {"failed": found.get("failed", "it was not run")}
    median, chip = float(np.median(found["seconds"])), chip_of(device)
    rate, compared = case.flops / median, bool(ours.get("seconds")) and not one.ours
    return result | {
        "seconds": found["seconds"],
        "median": median,
        "best": min(found["seconds"]),
        "ratio": float(np.median(ours["seconds"])) / median if compared else None,
        "flops": case.flops,
        "flop_per_second": rate,
        "share_of_limit": rate / max((each["product"] for each in limits.values()), default=1e30),
        "mfu": rate / chip.peak_bf16_flops if chip and case.dtype == "bfloat16" else None,
        "images_per_second": case.batch / median,
        "compile_seconds": found.get("compile_seconds", max(found["first_seconds"] - median, 0.0)),
        "peak_bytes": found["peak_bytes"],
        "memory": found.get("memory"),
        "errors": relative_errors(ours["result"], found["result"]) if compared else None,
    }

"""A contest: processes of both sides take turns at one case after another, and what comes out are
rows.

By default all sides of a case are open at once and run by turns, A B A B …, so that a machine that
slows down slows all of them. Where their memory does not go together each lives alone, one after
the other (``alone``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.speed import inputs, weights
from benchmarks.speed.cases import Case
from pixart_jax.parallel.chips import chip_of

ROOT = Path(__file__).resolve().parents[2]
OURS = "pixart_jax"
# seconds before each turn: threads of the side that ran before look for work in circles for a while
REST = 0.25


@dataclasses.dataclass(frozen=True)
class Contender:
    """label: what tables call it. side: 'ours' or 'peer', the worker's module. how: see ours.py and
    peer.py. env: added for its process."""

    label: str
    side: str
    how: tuple[tuple[str, object], ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def ours(self) -> bool:
        return self.side == "ours"


class Died(Exception):
    """A worker ended before it answered; the message is the last line that it said."""


class Process:
    """A worker (worker.py) that is asked and answers. compile_cache: where both sides keep what
    they compile; fresh a contest."""

    def __init__(
        self, side: str, scratch: Path, compile_cache: Path, env: Sequence[tuple[str, str]] = ()
    ):
        self.said: dict | None = None  # its platform and device, once it has begun
        self._log = open(scratch / f"{side}-{time.monotonic_ns()}.log", "w+")
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "HF_HUB_OFFLINE": "1",
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache / "jax"),
            "TORCHINDUCTOR_CACHE_DIR": str(compile_cache / "inductor"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            **dict(env),
        }
        command = [sys.executable, "-m", "benchmarks.speed.worker", side]
        pipes = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self._log,
            "text": True,
        }
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)

    def ask(self, do: str, **more) -> None:
        try:
            self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Died(self._last_words()) from None

    def answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise Died(self._last_words())
        return json.loads(line)

    def call(self, do: str, **more) -> dict:
        self.ask(do, **more)
        return self.answer()

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._process.wait()
        self._log.flush()
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return (
            f"exit status {self._process.returncode}: {lines[-1] if lines else 'it said nothing'}"
        )


@dataclasses.dataclass(frozen=True)
class Rules:
    """repeat: timed runs a side, at least one; no new round begins after budget seconds of a case.
    alone: each side lives alone.
    keep: the processes serve all cases of a contest, which saves their start; ours then counts the
    device's memory from its first case on, so cases go from small to large. compile_cache: a
    folder; None: a fresh one, so that compile times are cold."""

    repeat: int = 5
    budget: float = 600.0
    alone: bool = False
    keep: bool = False
    compile_cache: Path | None = None


class Contest:
    """Rows of cases; a context, for the processes and files it holds. told: called with each line
    of what goes on."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        rules: Rules,
        told: Callable[[str], None] = lambda line: None,
    ):
        self._contenders, self._rules, self._told = contenders, rules, told
        self._processes: dict[str, Process] = {}
        self._limits: dict[str, dict[str, dict[str, float]]] = {}
        self.machine: dict[str, str] = {}

    def __enter__(self):
        self._temporary = tempfile.TemporaryDirectory(prefix="speed.")
        self._scratch = Path(self._temporary.name)
        self._compile_cache = self._rules.compile_cache or self._scratch / "compiled"
        return self

    def __exit__(self, *_):
        for label in list(self._processes):
            self._end(label)
        self._temporary.cleanup()

    def limits(self, dtype: str) -> dict[str, dict[str, float]]:
        """{'ours': {'product', 'copy', 'side'}, 'peer': likewise} of this machine, measured once a
        contest, a side at a time."""
        if dtype not in self._limits:
            one_a_side = {contender.side: contender for contender in reversed(self._contenders)}
            for contender in one_a_side.values():
                self._start(contender)
            measured = {
                side: self._process(contender).call("limit", dtype=dtype)
                for side, contender in sorted(one_a_side.items())
            }
            self._limits[dtype] = measured
            if self._rules.alone:
                for contender in one_a_side.values():
                    self._end(contender.label)
        return self._limits[dtype]

    def rows(self, case: Case) -> Iterator[dict]:
        """A row a contender, in their order. Ours comes first; errors and ratios are against it."""
        limits = self.limits(case.dtype)
        arrays, folder = self._scratch / "inputs.npz", str(weights.folder_of(case))
        inputs.write(case, arrays)
        found = {contender.label: {} for contender in self._contenders}
        for group in (
            [[one] for one in self._contenders] if self._rules.alone else [self._contenders]
        ):
            self._measure(group, case, folder, str(arrays), found)
            first = next(
                (
                    found[one.label]
                    for one in self._contenders
                    if one.ours and found[one.label].get("seconds")
                ),
                None,
            )
            for contender in group:
                yield row(
                    case,
                    contender,
                    found[contender.label],
                    first,
                    limits,
                    self.machine.get("device", ""),
                )

    def _measure(
        self,
        group: Sequence[Contender],
        case: Case,
        folder: str,
        arrays: str,
        found: dict[str, dict],
    ) -> None:
        living = []
        for contender in group:
            self._start(contender)
        # all are asked before the first has answered: they compile at the same time
        for contender in group:
            with self._noting_death(contender, found):
                self._process(contender).ask(
                    "open",
                    case=dataclasses.asdict(case),
                    how=dict(contender.how),
                    folder=folder,
                    arrays=arrays,
                )
                living.append(contender)
        for contender in list(living):
            with self._noting_death(contender, found, living):
                found[contender.label] |= self._process(contender).answer() | {"seconds": []}
                path = self._scratch / f"{self._contenders.index(contender)}.npz"
                self._process(contender).call("result", path=str(path))
                found[contender.label]["result"] = inputs.read(str(path))
                self._told(
                    f"{contender.label}: first run {found[contender.label]['first_seconds']:.2f} s"
                )
        begun = time.perf_counter()
        for number in range(self._rules.repeat):
            if number and time.perf_counter() - begun > self._rules.budget:
                break
            for contender in list(living):
                with self._noting_death(contender, found, living):
                    time.sleep(REST)
                    found[contender.label]["seconds"].append(
                        self._process(contender).call("run")["seconds"]
                    )
        for contender in list(living):
            with self._noting_death(contender, found, living):
                found[contender.label] |= self._process(contender).call("memory")
                if self._rules.keep and not self._rules.alone:
                    self._process(contender).call("close")
                else:
                    self._end(contender.label)

    @contextlib.contextmanager
    def _noting_death(
        self, contender: Contender, found: dict[str, dict], living: list | None = None
    ):
        """A side that dies has failed; the others go on."""
        try:
            yield
        except Died as fault:
            self._told(f"{contender.label}: {fault}")
            found[contender.label] = {"failed": str(fault)}
            self._end(contender.label)
            if living is not None:
                living.remove(contender)

    def _start(self, contender: Contender) -> None:
        if contender.label not in self._processes:
            self._processes[contender.label] = Process(
                contender.side, self._scratch, self._compile_cache, contender.env
            )

    def _process(self, contender: Contender) -> Process:
        """The contender's process, which has said where it runs."""
        self._start(contender)
        process = self._processes[contender.label]
        if process.said is None:
            said = process.said = process.answer()
            known = self.machine.setdefault("platform", said["platform"])
            if known != said["platform"]:
                raise Died(
                    f"{contender.label} runs on {said['platform']}, the other side on {known}: "
                    "they cannot be compared"
                )
            if contender.ours or "device" not in self.machine:
                self.machine["device"] = said["device"]
        return process

    def _end(self, label: str) -> None:
        if label in self._processes:
            self._processes.pop(label).end()


def relative_errors(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Norm of the difference over the norm of the reference, an output; infinite where a number is
    none."""
    found = {}
    for name in sorted(set(ours) & set(theirs)):
        a, b = np.asarray(ours[name], np.float64), np.asarray(theirs[name], np.float64)
        error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        found[name] = error if np.isfinite(error) else float("inf")
    return found


def row(
    case: Case, contender: Contender, found: dict, ours: dict | None, limits: dict, device: str
) -> dict:
    """What was measured of one contender, and what follows from it. ours: what was measured of
    ours, None where it failed."""
    result = {
        "case": dataclasses.asdict(case),
        "size": case.size,
        "side": contender.label,
        "how": dict(contender.how),
    }
    if not found.get("seconds"):
        return result | {"failed": found.get("failed", "it was not run")}
    median, best = float(np.median(found["seconds"])), min(found["seconds"])
    chip, reached = chip_of(device), case.flops / median
    result |= {
        "seconds": found["seconds"],
        "median": median,
        "best": best,
        "ratio": None,
        "flops": case.flops,
        "flop_per_second": reached,
        "share_of_limit": reached / max(limit["product"] for limit in limits.values()),
        "mfu": reached / chip.peak_bf16_flops if chip and case.dtype == "bfloat16" else None,
        "images_per_second": case.batch / median,
        "compile_seconds": max(found["first_seconds"] - median, 0.0),
        "peak_bytes": found["peak_bytes"],
        "memory": found.get("memory"),
        "errors": None,
    }
    result |= {key: found[key] for key in ("compile_seconds",) if key in found}
    if ours is not None and not contender.ours:
        result["ratio"] = float(np.median(ours["seconds"])) / median
        result["errors"] = relative_errors(ours["result"], found["result"])
    return result

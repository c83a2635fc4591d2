"""Jobs compiled, each in a process of its own: its platform's settings stay its own, and its memory
and time are bounded."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pixart_jax.errors import UserError
from pixart_jax.files import cache_folder
from pixart_jax.planning import topology as topologies
from pixart_jax.planning.jobs import GIB, CompiledStats, PlanTarget

_POLL = 0.2  # seconds


@dataclasses.dataclass(frozen=True)
class CompileLimits:
    """Of one compilation on this machine."""

    gib: float = 4.0
    seconds: float = 600.0

    def __post_init__(self):
        for field in ("gib", "seconds"):
            if not getattr(self, field) > 0:
                raise UserError(f"--compile-{field} {getattr(self, field)}: must be positive")


def compiled(job: PlanTarget, bounds: CompileLimits) -> CompiledStats:
    """What the job's program is. UserError where it cannot be compiled within the bounds, or at
    all."""
    topologies.require_compiler(job.topology)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        given, result, log = (Path(folder) / name for name in ("job", "result", "log"))
        given.write_bytes(pickle.dumps(job))
        command = [
            sys.executable,
            "-m",
            "pixart_jax.planning.worker",
            str(given),
            str(result),
            str(cache_folder() / "plans"),
        ]
        with log.open("wb") as stream:
            root = str(Path(__file__).resolve().parents[2])
            child = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                env=_environment(job, root),
                stdin=subprocess.DEVNULL,
            )
            try:
                _watch(child, job, bounds)
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
        if not result.is_file():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            said = lines[-1][:300] if lines else "no word"
            raise UserError(
                f"{job.topology.name}, {job.label}: the compiling process ended with status "
                f"{child.returncode}: {said}"
            )
        found = json.loads(result.read_text())
    if "error" in found:
        raise UserError(found["error"])
    return CompiledStats.from_json(found["facts"])


def _environment(job: PlanTarget, root: str) -> dict[str, str]:
    found = topologies.environment(job.topology)
    found["PYTHONPATH"] = root + (":" + found["PYTHONPATH"] if found.get("PYTHONPATH") else "")
    return found


def _watch(child: subprocess.Popen, job: PlanTarget, bounds: CompileLimits) -> None:
    """Until the child ends; UserError once it passes a bound."""
    begun = time.monotonic()
    while child.poll() is None:
        time.sleep(_POLL)
        if time.monotonic() - begun > bounds.seconds:
            raise UserError(
                f"{job.topology.name}, {job.label}: not compiled in {bounds.seconds:g} s; "
                "--compile-seconds allows more, "
                "a smaller batch or a remat policy takes less"
            )
        if _resident(child.pid) > bounds.gib * GIB:
            raise UserError(
                f"{job.topology.name}, {job.label}: compiling takes more than {bounds.gib:g} GiB "
                "of this machine's memory; "
                "--compile-gib allows more"
            )


def _resident(process: int) -> int:
    """Bytes that a process holds; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)

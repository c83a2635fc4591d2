"""What a process can say of itself and its machine: peak memory, cores, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "numpy")


def peak_bytes() -> int:
    """The largest resident set of this process since it began, or since forget_peak, mapped pages
    of weight files included."""
    try:
        return 1024 * int(_status("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def resident_bytes() -> int:
    """The resident set of this process now; 0 where it is not told."""
    try:
        return 1024 * int(_status("VmRSS"))
    except (OSError, StopIteration):
        return 0


def forget_peak() -> None:
    """The peak is counted from now on, where Linux lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def available_bytes() -> float:
    """Memory that new processes can have; infinite where it is not told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(
            next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        )
    except (OSError, StopIteration):
        return float("inf")


def described() -> dict:
    """Cores, memory model and the versions of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "versions": found,
    }


def _status(name: str) -> str:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(line for line in lines if line.startswith(name)).split()[1]

"""The machine: memory of this process, versions, and the measured limits of its arithmetic."""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "transformers", "numpy")
SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # of the square matrix product
COPIED = {"cpu": 256 << 20, "gpu": 4 << 30, "tpu": 1 << 30}  # bytes


def peak_bytes() -> int:
    """The largest resident set since the start or reset_peak, mapped weight files included."""
    # getrusage's figure outlives exec: the child of a large process would show its parent's
    found = _status("VmHWM")
    if found is None:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return found


def resident_bytes() -> int:
    """The resident set of this process now; 0 where the system does not report it."""
    return _status("VmRSS") or 0


def reset_peak() -> None:
    """Count the peak from now on, where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
    except (OSError, StopIteration):
        return None


def set_cached(folder: Path, cached: bool) -> None:
    """Read a folder's files into the page cache, or drop them from it."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "rb") as file:
            if cached:
                while file.read(1 << 24):
                    pass
            else:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_process(function: Callable, *arguments):
    """function(*arguments) in a fresh process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def described() -> dict:
    """Cores, architecture and the versions of what is installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    system = {"architecture": platform.machine(), "python": platform.python_version()}
    return {"cores": os.cpu_count(), **system, "versions": versions}


def jax_limits(dtype: str) -> dict[str, float]:
    """{'product': FLOP/s, 'copy': bytes/s read and written, 'side'} through jax."""
    import jax
    import jax.numpy as jnp

    where = jax.default_backend()
    a, b = (  # random: on a GPU zeros are faster
        jax.random.normal(jax.random.key(n), (SIDE[where], SIDE[where])).astype(dtype)
        for n in range(2)
    )
    large = jax.random.normal(jax.random.key(2), (COPIED[where] // 4,))
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.copy)
    return _limits(
        where, lambda: jax.block_until_ready(product(a, b)), lambda: copy(large).block_until_ready()
    )


def torch_limits(dtype: str) -> dict[str, float]:
    """As jax_limits, through torch."""
    import torch

    where, device = ("gpu", "cuda") if torch.cuda.is_available() else ("cpu", "cpu")
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    shape = SIDE[where], SIDE[where]
    a, b = (torch.randn(*shape, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out, large = torch.empty_like(a), torch.randn(COPIED[where] // 4, device=device)
    target = torch.empty_like(large)
    return _limits(
        where, lambda: (torch.matmul(a, b, out=out), wait()), lambda: (target.copy_(large), wait())
    )


def _limits(where: str, product: Callable, copy: Callable) -> dict[str, float]:
    flops, moved = 2.0 * SIDE[where] ** 3, 2.0 * COPIED[where]
    return {"product": flops / _best(product), "copy": moved / _best(copy), "side": SIDE[where]}


def _best(call: Callable, repeat: int = 10) -> float:
    """Seconds of the fastest call; the first is not counted."""
    call()
    found = []
    for _ in range(repeat):
        begun = time.perf_counter()
        call()
        found.append(time.perf_counter() - begun)
    return min(found)

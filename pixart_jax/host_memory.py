"""Memory that a process frees and takes again: kept by the C library, where XLA computes on the processor itself.

XLA asks malloc for a program's temporaries at every call and frees them behind it; those of a train step hold all gradients. glibc
returns blocks of that size to the kernel at once, and gets them back as pages that the kernel clears one fault at a time: for XL/2
600,000 faults a step. Kept, the same pages serve every step, and the peak is lower, for nothing is taken twice.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform

# mallopt's parameters, from malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("jax_plugins", "libtpu")  # what jax[cuda…] and jax[tpu] bring


def keep_freed() -> bool:
    """From now on freed memory stays with this process; True if that is so.

    Call it before JAX's first computation: threads that have a heap of their own by then keep it, and only the common heap holds large
    blocks. Does nothing, and says so by False, where another C library than glibc is at work, where JAX could compute elsewhere than on the
    processor, whose memory then needs no help, and where the environment sets malloc already (MALLOC_*, GLIBC_TUNABLES).
    """
    if platform.libc_ver()[0] != "glibc" or not _on_processor_alone() or _set_by_environment():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # one heap; no block apart from it, which could not be kept; never cut short (-1: no threshold)
    return all(mallopt(name, value) == 1 for name, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)))


def _on_processor_alone() -> bool:
    asked = os.environ.get("JAX_PLATFORMS", "")
    return asked == "cpu" or (not asked and not any(importlib.util.find_spec(name) for name in _ACCELERATORS))


def _set_by_environment() -> bool:
    return any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")

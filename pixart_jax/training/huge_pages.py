"""Huge pages for a training process on a CPU, which must be asked for before the process begins.

A train step takes its temporaries, gigabytes of them, from malloc and gives them back. glibc
returns such blocks to the kernel, which clears them anew, 4 KiB at a time, in the next step; and a
product reads its weights through as many entries of the page table. glibc can ask for pages of 2
MiB instead, but reads that wish (``glibc.malloc.hugetlb=1``) from the environment that a program
starts with.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
SINCE = (2, 35)  # glibc's first version with the tunable
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PLUGINS = ("jax_plugins", "libtpu")  # packages by which JAX finds an accelerator


def variables(
    environ: Mapping[str, str], kernel: str, libc: str, accelerators: bool
) -> dict[str, str]:
    """What to add to environ before the process begins; nothing where nothing is to be gained or
    somebody has decided already.

    kernel: what the file KERNEL says, as ``always [madvise] never``; libc: as ``glibc 2.36``;
    accelerators: JAX may find one. ``GLIBC_TUNABLES=glibc.malloc.hugetlb=0`` in environ keeps the
    process as it is.
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    platforms = environ.get("JAX_PLATFORMS", "")
    on_cpu = platforms == "cpu" or (not platforms and not accelerators)
    version = re.fullmatch(r"glibc (\d+)\.(\d+).*", libc)
    able = (
        version is not None and tuple(map(int, version.groups())) >= SINCE and "[madvise]" in kernel
    )
    if not on_cpu or not able or TUNABLE in tunables:
        return {}
    return {"GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{TUNABLE}=1")))}


def here(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """``variables`` of this machine."""
    if not sys.platform.startswith("linux") or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return {}
    kernel = KERNEL.read_text() if KERNEL.is_file() else ""
    accelerators = any(importlib.util.find_spec(name) for name in PLUGINS)
    return variables(environ, kernel, os.confstr("CS_GNU_LIBC_VERSION") or "", accelerators)


def start_again() -> None:
    """Start this very command again with huge pages, in the same process (same number, same open
    pipes), where that helps.

    To be called first of all: what the process holds is lost. Under a debugger or a tracer, and
    where this command is not the process's own, as in a notebook's %run, nothing happens.
    """
    own = sys.gettrace() is None and sys.orig_argv[-len(sys.argv) :] == sys.argv
    added = here() if own else {}
    if added:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **added})

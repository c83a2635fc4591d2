"""The compilers of hardware that this machine lacks (requirements-compilers.txt), for processes
that a test starts.

They are installed into .venv/compilers, because a JAX that can import the CUDA plugin looks for a
GPU. A test marked ``needs("v5e:4x4")`` runs where that topology's compiler is there or installed as
usual, in the version that fits the installed JAX; ``path()`` goes onto its process's PYTHONPATH.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_jax.planning import topology

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("PIXART_JAX_COMPILERS", Path(sys.prefix) / "compilers"))


def path() -> str:
    """A PYTHONPATH: the project, its tests, the compilers."""
    return os.pathsep.join(map(str, (ROOT, ROOT / "tests", FOLDER)))


def missing(name: str) -> str | None:
    """Why nothing can be compiled for the topology, and what to install; None where it can."""
    platform = topology.parse(name).platform
    found = [
        d.version
        for d in importlib.metadata.distributions(path=[str(FOLDER), *sys.path])
        if d.metadata["Name"].replace("_", "-") == topology.COMPILERS[platform]
    ]
    error = topology.compiler_error(platform, found[0] if found else None)
    return error and f"{name}: {error} (`make test` installs requirements-compilers.txt)"


def needs(name: str) -> pytest.MarkDecorator:
    reason = missing(name)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def compiled(name: str, script: Path, *arguments: str):
    """What a script prints as its last line, JSON, in a process that compiles for the topology."""
    own = {"PYTHONPATH": path(), "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    how = {"env": topology.environment(topology.parse(name)) | own, "timeout": 900}
    command = [sys.executable, str(script), name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

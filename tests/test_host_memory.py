"""Freed memory stays with the process: the second call of a program takes no page anew."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from pixart_jax import host_memory
kept = host_memory.keep_freed() if sys.argv[1] == "keep" else None
import jax, jax.numpy as jnp

@jax.jit
def program(x):
    held = jax.lax.optimization_barrier(jnp.outer(x, x))  # 64 MiB: 16,384 pages
    return jnp.sum(jnp.cos(held.T) * held)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(jnp.arange(4096.0)).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps({"kept": kept, "faults": [faults() for _ in range(24)]}))
"""


def run(root, *program: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment = {**clean, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", *program], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_program_called_again_takes_no_page_anew(root):
    free, kept = (json.loads(run(root, PROGRAM, how)) for how in ("free", "keep"))
    assert kept["kept"] is True
    assert statistics.median(free["faults"]) > 10_000, free
    assert statistics.median(kept["faults"]) < 1_000, kept  # a block that lies elsewhere for once is new there


SAID = [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, {"JAX_PLATFORMS": "cpu,cuda"}]


@pytest.mark.parametrize("environment", SAID, ids=lambda said: next(iter(said)))
def test_what_the_environment_says_holds_and_accelerators_are_left_alone(root, environment):
    assert run(root, "from pixart_jax import host_memory; print(host_memory.keep_freed())", **environment).strip() == "False"

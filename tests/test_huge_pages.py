"""A training process on a CPU starts itself again with huge pages: once, where that helps, with all that it was called with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_jax import huge_pages

ROOT = Path(__file__).resolve().parent.parent
ABLE = {"kernel": "always [madvise] never", "libc": "glibc 2.36", "accelerators": False}
PRINTS = """
import json, os, sys
from pixart_jax import huge_pages
began = os.environ.setdefault("BEGAN", str(os.getpid()))
huge_pages.start_again()
print(json.dumps([began == str(os.getpid()), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), sys.stdin.read()]))
"""


def test_it_is_added_to_what_the_environment_says():
    assert huge_pages.environment({"A": "b"}, **ABLE) == {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    env = {"GLIBC_TUNABLES": "glibc.malloc.check=1", "JAX_PLATFORMS": "cpu"}
    assert huge_pages.environment(env, **{**ABLE, "accelerators": True}) == {
        **env,
        "GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1",
    }


@pytest.mark.parametrize(
    ("environ", "machine"),
    [
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, {}),  # somebody has decided
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, {}),  # it is done
        ({}, {"accelerators": True}),
        ({"JAX_PLATFORMS": "cuda"}, {}),
        ({}, {"kernel": "[always] madvise never"}),  # every block has them
        ({}, {"kernel": "always madvise [never]"}),
        ({}, {"kernel": ""}),
        ({}, {"libc": "glibc 2.34"}),
        ({}, {"libc": "musl"}),
    ],
)
def test_nothing_happens_where_nothing_is_gained(environ, machine):
    assert huge_pages.environment(environ, **{**ABLE, **machine}) is None


def started(tmp_path, *flags: str, run: str | None = None, **env: str) -> list:
    """What a script says that calls start_again. run: Python that runs the file script.py, in place of the file itself."""
    script = tmp_path / "script.py"
    script.write_text(PRINTS)
    env = {**{k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **env}
    command = [sys.executable, *flags, *([str(script)] if run is None else ["-c", run]), "--prompt", "a  b", "*"]
    done = subprocess.run(command, cwd=tmp_path, env=env, input="given", capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(huge_pages.environment({"JAX_PLATFORMS": "cpu"}, **{
    **ABLE,
    "kernel": huge_pages.KERNEL.read_text() if huge_pages.KERNEL.is_file() else "",
}) is None, reason="this kernel has no huge pages to ask for")  # fmt: skip
def test_the_same_process_goes_on_with_its_arguments_and_its_pipes(tmp_path):
    assert started(tmp_path) == [True, ["--prompt", "a  b", "*"], "glibc.malloc.hugetlb=1", "given"]
    assert started(tmp_path, "-X", "dev", GLIBC_TUNABLES="glibc.malloc.check=0")[2] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"


def test_a_decision_is_left_as_it_is(tmp_path):
    assert started(tmp_path, GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == [
        True,
        ["--prompt", "a  b", "*"],
        "glibc.malloc.hugetlb=0",
        "given",
    ]


def test_a_process_that_runs_the_command_among_others_is_not_started_again(tmp_path):
    run = "import runpy, sys; sys.argv = ['script.py', '--prompt']; runpy.run_path('script.py', run_name='__main__')"
    assert started(tmp_path, run=run) == [True, ["--prompt"], None, "given"]

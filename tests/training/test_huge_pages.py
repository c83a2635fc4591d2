"""A training process on a CPU starts itself again with huge pages: once, where that helps, with all
that it was called with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pixart_jax.training import huge_pages

ROOT = Path(__file__).resolve().parents[2]
ABLE = {"kernel": "always [madvise] never", "libc": "glibc 2.36", "accelerators": False}
able = pytest.mark.skipif(
    not huge_pages.here({"JAX_PLATFORMS": "cpu"}), reason="no huge pages to ask for on this machine"
)
PRINTS = """
import json, os, sys
from pixart_jax.training import huge_pages
began = os.environ.setdefault("BEGAN", str(os.getpid()))
huge_pages.start_again()
print(json.dumps([began == str(os.getpid()), sys.argv[1:], os.environ.get("GLIBC_TUNABLES"), sys.stdin.read()]))
"""  # noqa: E501


def test_it_is_added_to_the_tunables_that_are_there():
    assert huge_pages.variables({"A": "b"}, **ABLE) == {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    given = {"GLIBC_TUNABLES": "glibc.malloc.check=1", "JAX_PLATFORMS": "cpu"}
    found = huge_pages.variables(given, **{**ABLE, "accelerators": True})
    assert found == {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}


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
    assert huge_pages.variables(environ, **{**ABLE, **machine}) == {}


def run(tmp_path, *command: str, **env: str) -> subprocess.CompletedProcess:
    """Python with these arguments on a CPU, in a folder where script.py is what PRINTS says."""
    (tmp_path / "script.py").write_text(PRINTS)
    env = {
        **{k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"},
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        **env,
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=env,
        input="given",
        capture_output=True,
        text=True,
    )


@able
def test_the_same_process_goes_on_with_its_arguments_and_its_pipes(tmp_path):
    done = run(tmp_path, "-X", "dev", "script.py", "--prompt", "a  b", "*")
    assert json.loads(done.stdout) == [
        True,
        ["--prompt", "a  b", "*"],
        "glibc.malloc.hugetlb=1",
        "given",
    ]


@able
def test_train_py_has_them(tmp_path):
    (tmp_path / "says.py").write_text(
        "import os, sys\n\nprint(os.environ['GLIBC_TUNABLES'])\nsys.exit(7)\n"
    )
    done = run(tmp_path, str(ROOT / "train.py"), "says.py", "--workdir", "run")
    assert (done.stdout, done.returncode) == ("glibc.malloc.hugetlb=1\n", 7), done.stderr


@able
def test_a_decision_is_left_as_it_is(tmp_path):
    done = run(tmp_path, "script.py", GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert json.loads(done.stdout) == [True, [], "glibc.malloc.hugetlb=0", "given"]


@able
def test_a_process_that_runs_the_command_among_others_is_not_started_again(tmp_path):
    among = (
        "import runpy, sys; sys.argv = ['script.py', '--prompt']; runpy.run_path('script.py', "
        "run_name='__main__')"
    )
    assert json.loads(run(tmp_path, "-c", among).stdout) == [True, ["--prompt"], None, "given"]

"""What every test runs under: the CPU, a compilation cache that outlives the run, one thread a
library, no network."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before jax, transformers and tfds are imported; what the environment already says stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("PIXART_JAX_CACHE", str(ROOT / ".cache" / "pixart_jax"))
# PyTorch's tiny models take ten times as long where two threads wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")
# nohup and background jobs ignore SIGINT, and the programs that tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
# a test that needs a download is a mistake, and should say so at once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("PYTHONPATH", str(ROOT))  # for the programs that tests start
# Most of these tests' time is compilation, and models so small gain nothing by good machine code.
# Modules that ask for ``optimized`` are compiled as a user's are, and so is everything on another
# platform; `JAX_DISABLE_MOST_OPTIMIZATIONS=false make test`: all modules.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import pytest  # noqa: E402

pytest_plugins = ["tests.stores"]  # fixtures: object stores on loopback
TORCH = {"torch", "diffusers", "peft"}


class _ParityOff:
    """Import hook of PARITY=off: a test that imports PyTorch is skipped, and counted as such.
    Imports by the package and by libraries are left alone."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in TORCH and name != "safetensors.torch":
            return None
        frame = sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        if not {ROOT / "tests", ROOT / "benchmarks"} & set(Path(frame.f_code.co_filename).parents):
            return None
        pytest.skip(_PARITY_OFF, allow_module_level=True)


_PARITY_OFF = "PARITY=off: compares with PyTorch"
if os.environ.get("PARITY") == "off":
    sys.meta_path.insert(0, _ParityOff())


def pytest_addoption(parser):
    parser.addoption("--fail-on-skip", action="store_true", help="a skipped test fails the run")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.config.option.fail_on_skip and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Says how many tests PARITY=off left out: a module that imports PyTorch counts with all of
    its test functions."""
    skipped = [
        r for r in terminalreporter.stats.get("skipped", []) if _PARITY_OFF in str(r.longrepr)
    ]
    if skipped:
        tests = sum(_test_functions(report) for report in skipped)
        terminalreporter.write_line(f"PARITY=off left out at least {tests} tests")


def _test_functions(report) -> int:
    if report.when != "collect":
        return 1
    return (ROOT / report.nodeid).read_text(encoding="utf-8").count("\ndef test_")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root: where train.py, configs/ and assets/ lie."""
    return ROOT


@pytest.fixture(scope="module")
def whole_memory(tmp_path_factory):
    """One module at a time, over all workers, holds many GiB: from its first test that asks for
    this to its last test."""
    import fcntl

    with open(tmp_path_factory.getbasetemp().parent / "whole_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="module")
def optimized():
    """This module's programs, and those of the processes it starts, are compiled as users compile
    them."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "false")
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a whole tiny model; read it, or copy it to break it."""
    from tests import tiny_diffusers

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_diffusers.build(folder)
    return folder

"""What every test runs under: the CPU, a compilation cache that outlives the run, two threads a
library, no network."""

from __future__ import annotations

import os
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before jax, transformers and tfds are imported; what the environment already says stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("PIXART_JAX_CACHE", str(ROOT / ".cache" / "pixart_jax"))
os.environ.setdefault("OMP_NUM_THREADS", "2")
# a test that needs a download is a mistake, and should say so at once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("PYTHONPATH", str(ROOT))  # for the programs that tests start
# Most of these tests' time is compilation, and models so small gain nothing by good machine code.
# Modules that ask for ``optimized`` are compiled as a user's are, and so is everything on another
# platform; `JAX_DISABLE_MOST_OPTIMIZATIONS=false make test`: all modules.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")

import pytest  # noqa: E402

# The order in which files are begun: where the time does not suffice for all slow tests
# (TESTS_UNTIL), those are left out that take minutes each and strike, move or measure once more
# what others have shown in less.
FIRST = (
    "training/test_run.py",
    "parallel/test_train_step_on_meshes.py",
    "test_parity_table.py",
    "training/test_step_compiled.py",
)
LAST = (
    "planning/test_programs_for_hardware.py",
    "training/test_processes_killed.py",
    "captioning/test_caption_command.py",
    "planning/test_memory.py",
    "models/test_full_size.py",
    "training/test_interruptions.py",
    "training/test_curves.py",
    "test_sample_killed.py",
    "test_data_document.py",
    "benchmarks/test_fused_projections.py",
    "benchmarks/test_speed.py",
)


def pytest_collection_modifyitems(items):
    place = {ROOT / "tests" / name: number - len(FIRST) for number, name in enumerate(FIRST)}
    place |= {ROOT / "tests" / name: number + 1 for number, name in enumerate(LAST)}
    items.sort(key=lambda item: place.get(item.path, 0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """TESTS_UNTIL, seconds since 1970: a slow test that would begin later is skipped. `make test`
    sets it."""
    until = os.environ.get("TESTS_UNTIL")
    if until and time.time() > float(until) and item.get_closest_marker("slow"):
        pytest.skip("slow, and the time is up: `make test-slow` runs all of these")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root: where train.py, configs/ and assets/ lie."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _few_torch_threads():
    """PyTorch, where it is installed, takes two threads: the references run beside JAX on a small
    machine."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(2)


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


@pytest.fixture(scope="session")
def sample_program(root):
    """sample.py as a module."""
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("sample_program", root / "sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sample_program"] = module
    spec.loader.exec_module(module)
    return module

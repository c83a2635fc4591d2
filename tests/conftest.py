"""What every test runs under: the CPU, a compilation cache that outlives the run, two threads a library, no network."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before jax, transformers and tfds are imported; what the environment already says stays.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("PIXART_JAX_CACHE", str(ROOT / ".cache" / "pixart_jax"))
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that needs a download is a mistake, and should say so at once
os.environ.setdefault("PYTHONPATH", str(ROOT))  # for the programs that tests start

import pytest  # noqa: E402

# Files that take minutes are begun first, so that no worker is left alone with one at the end (make test keeps this order).
LONGEST = (
    "training/test_run.py",
    "training/test_processes_killed.py",
    "labelling/test_caption_command.py",
    "training/test_curves.py",
    "training/test_interruptions.py",
    "parallel/test_train_step_on_meshes.py",
    "planning/test_memory.py",
    "test_sample_killed.py",
    "labelling/test_encode.py",
    "test_parity_table.py",
    "models/test_full_size.py",
)


def pytest_collection_modifyitems(items):
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root: where train.py, configs/ and assets/ lie."""
    return ROOT


@pytest.fixture(scope="session", autouse=True)
def _few_torch_threads():
    """PyTorch, where it is installed, takes two threads: the references run beside JAX on a small machine."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def whole_memory(tmp_path_factory):
    """One module at a time, over all workers, holds many GiB: from its first test that asks for this to its last test."""
    import fcntl

    with open(tmp_path_factory.getbasetemp().parent / "whole_memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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

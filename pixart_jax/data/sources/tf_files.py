"""TensorFlow's file functions without TensorFlow, for as long as tensorflow-datasets builds a set.

Many of its builders, ImageNet's among them, need TensorFlow for ``tf.io.gfile`` and names of dtypes
alone. Its own paths, which open what gfile opens, serve as well. A builder that asks for more gets
the ModuleNotFoundError that it would get without this.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator

import numpy as np

_DTYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """``import tensorflow`` gives file functions and dtypes; nothing is changed where TensorFlow is
    installed."""
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    sys.modules["tensorflow"] = _module()
    try:
        yield
    finally:
        del sys.modules["tensorflow"]


def _module() -> types.ModuleType:
    from tensorflow_datasets.core import as_path

    class GFile:
        """``tf.io.gfile.GFile``: a file opened by its path."""

        def __new__(cls, name, mode="r"):
            return as_path(os.fspath(name)).open(mode)

    gfile = types.SimpleNamespace(
        GFile=GFile,
        Open=GFile,
        exists=lambda path: as_path(path).exists(),
        isdir=lambda path: as_path(path).is_dir(),
        listdir=lambda path: [child.name for child in as_path(path).iterdir()],
        makedirs=lambda path: as_path(path).mkdir(parents=True, exist_ok=True),
        glob=_glob,
        walk=os.walk,
        join=os.path.join,
    )
    module = types.ModuleType("tensorflow")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorflow", None)
    module.__version__ = "2.20.0"  # tensorflow-datasets asks for 2.1 or newer
    module.io = types.SimpleNamespace(gfile=gfile)
    for name in _DTYPES:
        setattr(module, name, np.dtype(name).type)
    module.string = object
    module.dtypes = types.SimpleNamespace(DType=type("DType", (), {}), as_dtype=np.dtype)
    # only asked of values whether they are one
    for name in ("Tensor", "RaggedTensor", "SparseTensor"):
        setattr(module, name, type(name, (), {}))
    module.__getattr__ = _absent
    return module


def _glob(patterns) -> list[str]:
    import glob

    patterns = [patterns] if isinstance(patterns, (str, os.PathLike)) else patterns
    return [found for pattern in patterns for found in glob.glob(str(pattern))]


def _absent(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    raise ModuleNotFoundError(f"this needs TensorFlow itself (tf.{name})", name="tensorflow")

"""TensorFlow's file functions without TensorFlow, while tensorflow-datasets prepares a set.

Many builders, ImageNet's and COCO's among them, need TensorFlow only for ``tf.io.gfile`` and names
of dtypes. One that needs more gets the ModuleNotFoundError that it would get without this module.
"""

from __future__ import annotations

import contextlib
import glob
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
    """Let ``import tensorflow`` give file functions and dtypes, unless TensorFlow is installed."""
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
        def __new__(cls, name, mode="r"):
            return as_path(os.fspath(name)).open(mode)

    def find(patterns) -> list[str]:
        patterns = [patterns] if isinstance(patterns, str | os.PathLike) else patterns
        return [found for pattern in patterns for found in glob.glob(str(pattern))]

    def absent(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModuleNotFoundError(f"this needs TensorFlow itself (tf.{name})", name="tensorflow")

    gfile = types.SimpleNamespace(
        GFile=GFile,
        Open=GFile,
        exists=lambda path: as_path(path).exists(),
        isdir=lambda path: as_path(path).is_dir(),
        listdir=lambda path: [child.name for child in as_path(path).iterdir()],
        makedirs=lambda path: as_path(path).mkdir(parents=True, exist_ok=True),
        glob=find,
        walk=os.walk,
        join=os.path.join,
    )
    module = types.ModuleType("tensorflow")
    contents = {
        "__spec__": importlib.machinery.ModuleSpec("tensorflow", None),
        "__version__": "2.20.0",  # tensorflow-datasets asks for 2.1 or newer
        "io": types.SimpleNamespace(gfile=gfile),
        "string": object,
        "dtypes": types.SimpleNamespace(DType=type("DType", (), {}), as_dtype=np.dtype),
        **{name: np.dtype(name).type for name in _DTYPES},
        # values are only compared with these
        **{name: type(name, (), {}) for name in ("Tensor", "RaggedTensor", "SparseTensor")},
        "__getattr__": absent,
    }
    vars(module).update(contents)
    return module

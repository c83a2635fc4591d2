"""A cache of converted weights, so that the second load of a model converts no axes and no dtypes.

One safetensors file per (model folder, dtype, quantization), with our own names. Its metadata
records the source files, by size and modification time, and a hash of the converting code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.weights.files import SafetensorsFile, write_safetensors
from pixart_jax.weights.streaming import leaves

SMALLEST = 64 << 20  # bytes; smaller models load fast without a cache
_IDENTITY = "pixart_jax"  # key in the file's metadata


class ParamCache:
    """root: the cache's folder; None: no cache. how: (dtype, quantization)."""

    def __init__(self, root: str | os.PathLike | None, folder: Path, how: tuple):
        self._folder, self._how = folder.resolve(), how
        key = hashlib.sha256(f"{self._folder} {how}".encode()).hexdigest()[:16]
        name = f"{self._folder.parent.name}-{self._folder.name}-{key}.safetensors"
        self._path = None if root is None else Path(root) / name

    def find(self) -> SafetensorsFile | None:
        """The cached file; None without one of these source files and this code."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            cached = SafetensorsFile(self._path)
        except UserError as error:
            _say(f"{error}; it is a cache, and made anew")
            return None
        return cached if cached.metadata.get(_IDENTITY) == self._identity() else None

    def store(self, params: Mapping) -> None:
        """Write the parameters, unless small, on several hosts or the disk is full."""
        if self._path is None:
            return
        flat = leaves(params)
        size = sum(array.nbytes for array in flat.values())
        if size < SMALLEST or not all(array.is_fully_addressable for array in flat.values()):
            return
        root = self._path.parent
        root.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(root).free) < 1.1 * size:
            room = f"{size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
            _say(f"the weights of {self._folder} are not kept in {root}: {room}")
            return
        write_safetensors(self._path, flat, {_IDENTITY: self._identity()})

    def _identity(self) -> str:
        files = {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(self._folder.iterdir())
            if path.is_file()
        }
        return json.dumps([files, list(self._how), _code(), sys.byteorder])


@functools.cache
def _code() -> str:
    """A hash of the code of the models, the tables of names and the readers."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for file in sorted([*package.glob("models/*.py"), *package.glob("weights/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)

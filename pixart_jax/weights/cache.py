"""Weights as they lie in memory, kept on disk: the second opening of a model changes no axes and no dtype.

One safetensors file for each (model folder, dtypes), under our own names. Its header says which files it was made of, by size
and time of change, and by which table; where any of that has changed it is made anew in its place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.weights.files import SafetensorsFile, write_safetensors
from pixart_jax.weights.streaming import leaves
from pixart_jax.weights.table import Entry

SMALLEST = 64 << 20  # bytes; what is smaller opens at once anyway
_IDENTITY = "pixart_jax"  # the key in the file's metadata
_VERSION = 1

Made = Mapping[str, tuple[tuple[int, ...], str]]  # {path: (shape, dtype's name)}


class Cache:
    """The kept weights of one model folder."""

    def __init__(self, root: Path, folder: Path):
        self._root, self._folder = root, folder

    def find(self, made: Made, table: Iterable[Entry]) -> SafetensorsFile | None:
        """The kept file of just these parameters; None where there is none, or it was made of other files."""
        path = self._path(made)
        if not path.is_file():
            return None
        try:
            held = SafetensorsFile(path)
        except UserError as fault:
            _say(f"{fault}; it is a cache, and made anew")
            return None
        return held if held.metadata.get(_IDENTITY) == self._identity(made, table) else None

    def keep(self, params: Mapping, made: Made, table: Iterable[Entry]) -> None:
        """Write the parameters, unless they are few, lie on several hosts, or the disk has no room for them, which is said."""
        flat = leaves(params)
        size = sum(array.nbytes for array in flat.values())
        if size < SMALLEST or not all(array.is_fully_addressable for array in flat.values()):
            return
        self._root.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self._root).free) < 1.1 * size:
            _say(f"the weights of {self._folder} are not kept in {self._root}: {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there")
            return
        write_safetensors(self._path(made), flat, {_IDENTITY: self._identity(made, table)})

    def _path(self, made: Made) -> Path:
        folder = self._folder.resolve()
        key = f"{folder} {sorted({dtype for _, dtype in made.values()})}"
        return self._root / f"{folder.parent.name}-{folder.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    def _identity(self, made: Made, table: Iterable[Entry]) -> str:
        files = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(self._folder.iterdir()) if path.is_file()}
        how = hashlib.sha256(repr((sorted(made.items()), tuple(table))).encode()).hexdigest()
        return json.dumps([_VERSION, files, how, sys.byteorder])


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)

"""Weights as they lie in memory, kept on disk: the second opening of a model changes no axes and no
dtype.

One safetensors file for each (model folder, dtypes), under our own names. Its header says which
files it was made of, by size and time of change, and by which code; where any of that has changed
it is made anew in its place.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.weights.files import SafetensorsFile, write_safetensors
from pixart_jax.weights.streaming import leaves

SMALLEST = 64 << 20  # bytes; what is smaller opens at once anyway
_IDENTITY = "pixart_jax"  # the key in the file's metadata


class ParamCache:
    """The kept weights of one model folder, opened in one way (dtype, quantization)."""

    def __init__(self, root: Path, folder: Path, how: tuple):
        self._root, self._folder, self._how = root, folder.resolve(), how

    def find(self) -> SafetensorsFile | None:
        """The kept file; None where there is none, or it was made of other files or by other
        code."""
        if not self._path.is_file():
            return None
        try:
            held = SafetensorsFile(self._path)
        except UserError as fault:
            _say(f"{fault}; it is a cache, and made anew")
            return None
        return held if held.metadata.get(_IDENTITY) == self._identity() else None

    def store(self, params: Mapping) -> None:
        """Write the parameters, unless they are few, lie on several hosts, or the disk has no room
        for them, which is said."""
        flat = leaves(params)
        size = sum(array.nbytes for array in flat.values())
        if size < SMALLEST or not all(array.is_fully_addressable for array in flat.values()):
            return
        self._root.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self._root).free) < 1.1 * size:
            _say(
                f"the weights of {self._folder} are not kept in {self._root}: {size / 1e9:.1f} "
                f"GB, and {free / 1e9:.1f} GB are free there"
            )
            return
        write_safetensors(self._path, flat, {_IDENTITY: self._identity()})

    @property
    def _path(self) -> Path:
        key = hashlib.sha256(f"{self._folder} {self._how}".encode()).hexdigest()[:16]
        return self._root / f"{self._folder.parent.name}-{self._folder.name}-{key}.safetensors"

    def _identity(self) -> str:
        files = {
            path.name: [path.stat().st_size, path.stat().st_mtime_ns]
            for path in sorted(self._folder.iterdir())
            if path.is_file()
        }
        return json.dumps([files, list(self._how), _code(), sys.byteorder])


@functools.cache
def _code() -> str:
    """A hash of the code that lays parameters out: the models, the tables of names, the readers."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for file in sorted([*package.glob("models/*.py"), *package.glob("weights/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)

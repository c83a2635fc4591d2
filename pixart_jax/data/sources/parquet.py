"""Parquet files with embedded images, the form of most image sets on model hubs."""

from __future__ import annotations

import bisect
import functools
import hashlib
import io
import itertools
import threading
from typing import Any, BinaryIO

import pyarrow as pa

from pixart_jax.data.sources import texts
from pixart_jax.data.sources.indexed import Choice, Facts, IndexedSource
from pixart_jax.errors import UserError
from pixart_jax.remote_path import Location, located
from pixart_jax.tables import open_parquet


def image_column(schema: pa.Schema) -> str | None:
    """The first column of {bytes, path} (Hugging Face), or of bytes under a name of an image."""
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
        named = field.name.lower() in ("image", "img", "jpg", "jpeg", "png", "webp")
        if named and (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)):
            return field.name
    return None


def files_with_images(folder: Location) -> list[Location]:
    """The Parquet files below a folder that embed images."""
    found = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    return [path for path in found if image_column(open_parquet(path).schema_arrow)]


class ParquetSource(IndexedSource):
    """The rows of Parquet files whose images are embedded.

    what: a file, a folder or a pattern. A key is the file's name and the row. Every column of texts
    is a caption kind, a list is several captions; an integer 'label' is the class.
    """

    def __init__(self, what: str, choice: Choice):
        path = located(what)
        if path.is_dir():
            files = files_with_images(path)
        else:
            files = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not files:
            raise UserError(f"parquet:{what}: no Parquet file with embedded images")
        self.faults, self.name = choice.faults, f"parquet:{path.name}"
        self._files = [open_parquet(file) for file in files]
        columns = [image_column(file.schema_arrow) for file in self._files]
        for file, column in zip(files, columns):
            if column is None:
                raise UserError(f"{file} embeds no images: open its folder as folder:DIR")
        self._columns = [column or "" for column in columns]
        self._stems = [file.stem for file in files]
        self._firsts = [0, *itertools.accumulate(f.metadata.num_rows for f in self._files)]
        self._groups = [
            (number, group)
            for number, file in enumerate(self._files)
            for group in range(file.metadata.num_row_groups)
        ]
        rows = (self._files[n].metadata.row_group(g).num_rows for n, g in self._groups)
        self._starts = [0, *itertools.accumulate(rows)]  # of the row groups
        self._lock = threading.Lock()  # a ParquetFile serves one reader at a time
        self._images = functools.lru_cache(4)(self._read_images)
        self._texts = functools.lru_cache(8)(self._read_texts)
        kinds: dict[str, None] = {}
        for number, file in enumerate(self._files):
            if file.metadata.num_rows:
                row = self._texts(number, 0)[0]
                kinds |= dict.fromkeys(k for k, v in row.items() if texts.is_caption(k, v))
        self.caption_kinds = tuple(kinds)
        seal = hashlib.sha256()
        for file in files:
            status = file.stat()
            seal.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        self._choose(self._starts[-1], ["parquet", seal.hexdigest()], choice)

    def _at(self, place: int) -> tuple[int, int, int]:
        """(file, row group of it, row in that)."""
        number = bisect.bisect_right(self._starts, place) - 1
        return *self._groups[number], place - self._starts[number]

    def _key(self, place: int) -> str:
        number = bisect.bisect_right(self._firsts, place) - 1
        return f"{self._stems[number]}-{place - self._firsts[number]:06d}"

    def _read_images(self, number: int, group: int) -> pa.ChunkedArray:
        with self._lock:
            table = self._files[number].read_row_group(group, [self._columns[number]])
        return table.column(0)

    def _read_texts(self, number: int, group: int) -> list[dict[str, Any]]:
        """The rows of a row group without their bytes."""
        file = self._files[number]
        names = [f.name for f in file.schema_arrow if f.name != self._columns[number]]
        with self._lock:
            return file.read_row_group(group, names).to_pylist()

    def _open(self, place: int) -> BinaryIO:
        number, group, row = self._at(place)
        value = self._images(number, group)[row].as_py()
        return io.BytesIO((value["bytes"] if isinstance(value, dict) else value) or b"")

    def _facts(self, place: int) -> Facts:
        number, group, row = self._at(place)
        fields = self._texts(number, group)[row]
        key = self._key(place)
        captions = functools.partial(texts.captions_of, fields, key, self.faults)
        others = {k: v for k, v in fields.items() if isinstance(v, str | int | float | bool)}
        return Facts(texts.label_of(fields), others, captions)

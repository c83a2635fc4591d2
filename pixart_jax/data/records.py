"""Encoded samples on disk: ArrayRecord shards of safetensors records, and their manifest.

    folder/manifest.json            what the shards were made with; bucket, count, checksum of each
    folder/00000-64x64.array_record records of one bucket

A record is the bytes of a safetensors file: named arrays and text metadata. The manifest is written
last; a folder without one is unfinished. Readers refuse, by name, shards of another encoder,
missing or cut shards (by size, when opened) and damaged records (by Riegeli's chunk hash, when
read); :func:`check` compares whole files with their checksums. Shards in a bucket are fetched and
compared whole (shard_cache.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from pixart_jax.data.shard_cache import CACHE_GB, ShardCache
from pixart_jax.errors import UserError, one_line
from pixart_jax.files import SAFETENSORS_DTYPES, safetensors_header, write_json
from pixart_jax.remote_path import Location, RemotePath, located

FORMAT = 1
MANIFEST = "manifest.json"
# shards open at a time: large sets have more than a process may open, and opening takes 0.2 ms
_OPEN = 256


def encode_record(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Named arrays and texts as the bytes of a safetensors file; equal input gives equal bytes."""
    # wide types first, as safetensors does, so that every array is aligned
    order = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    data = (array.tobytes() for _, array in order)
    return b"".join((safetensors_header(order, metadata, align=8), *data))


def decode_record(
    record: bytes, names: Iterable[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a record; arrays are read-only views, of ``names`` only where given."""
    length = int.from_bytes(record[:8], "little")
    header = json.loads(record[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name in header if names is None else names:
        field = header[name]
        dtype, (begin, end) = SAFETENSORS_DTYPES[field["dtype"]], field["data_offsets"]
        count = (end - begin) // dtype.itemsize
        flat = np.frombuffer(record, dtype, count, 8 + length + begin)
        arrays[name] = flat.reshape(field["shape"])
    return arrays, metadata


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard's entry in the manifest. bucket: (height, width) in px. longest: caption kind →
    tokens of its longest text. skipped: (key, reason) of samples that could not be encoded.
    lacking: caption kind → places of the records without it. noted: (key, note) of captions lost by
    cleaning."""

    file: str
    bucket: tuple[int, int]
    count: int
    bytes: int
    sha256: str
    longest: Mapping[str, int] = dataclasses.field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()
    lacking: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    noted: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Shard:
        height, width = fields["bucket"]
        skipped = tuple(map(tuple, fields["skipped"]))
        noted = tuple(map(tuple, fields.get("noted", ())))
        lacking = {kind: tuple(places) for kind, places in fields.get("lacking", {}).items()}
        parsed = {"bucket": (height, width), "skipped": skipped, "lacking": lacking, "noted": noted}
        return cls(**{**fields, **parsed})


def sha256(path: Location) -> str:
    """Checksum of a whole file, in hex."""
    with path.open("rb", 1 << 25 if isinstance(path, RemotePath) else -1) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> int:
    """Write records to an ArrayRecord file, atomically and synced; return their count."""
    from array_record.python import array_record_module

    partial = path.with_name(f".{path.name}.partial")
    count = 0
    # One record a group for random access; the arrays do not compress.
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    try:
        for record in records:
            writer.write(record)
            count += 1
    except BaseException:
        with contextlib.suppress(Exception):
            writer.close()
        partial.unlink(missing_ok=True)
        raise
    writer.close()
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    return count


@dataclasses.dataclass(frozen=True)
class Manifest:
    """identity: what the records were made with, name → text. made_from: encoder → {"files",
    "dtype"} it was opened from; not part of the identity, as other files may hold the same."""

    identity: Mapping[str, str]
    shards: tuple[Shard, ...]
    made_from: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def longest(self) -> dict[str, int]:
        """Caption kind → tokens of its longest text."""
        kinds = sorted({kind for shard in self.shards for kind in shard.longest})
        return {kind: max(shard.longest.get(kind, 0) for shard in self.shards) for kind in kinds}

    @property
    def by_bucket(self) -> dict[tuple[int, int], int]:
        """(height, width) → number of records, in the order of the shards."""
        counts: dict[tuple[int, int], int] = {}
        for shard in self.shards:
            counts[shard.bucket] = counts.get(shard.bucket, 0) + shard.count
        return counts

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [entry for shard in self.shards for entry in shard.skipped]

    def write(self, folder: Location) -> None:
        made_from = {part: dict(how) for part, how in self.made_from.items()}
        fields = {"format": FORMAT, "identity": dict(self.identity), "made_from": made_from}
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        fields |= {"samples": self.samples, "shards": shards}
        write_json(folder / MANIFEST, fields, indent=1, sort_keys=True)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Manifest:
        """The manifest of a folder. Raises UserError if there is none, or it is damaged."""
        path = located(folder) / MANIFEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no {MANIFEST}: no encoded shards, or encoding has not finished"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise UserError(f"{path} has a format this version does not read: encode the set again")
        try:
            shards = tuple(map(Shard.from_json, fields["shards"]))
            return cls(fields["identity"], shards, fields.get("made_from", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged: {error!r}") from None


def check_identity(
    folder: str | os.PathLike, found: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    """Raise a UserError that names the entries of ``found`` that differ from ``expected``."""

    wrong = [
        f"{name} is {_brief(found.get(name))}, expected {_brief(value)}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if wrong:
        raise UserError(
            f"{folder} was encoded with something else: {'; '.join(wrong)}. Encode again"
        )


def _brief(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 60 else f"{value[:12]}…"


def sizes(folder: Location) -> dict[str, int]:
    """Bytes of each shard's file."""
    folder = type(folder)(folder)  # listed anew
    return {path.name: path.stat().st_size for path in folder.glob("*.array_record")}


def quick_check(folder: Location, shard: Shard, found: Mapping[str, int]) -> str | None:
    """What is wrong with a shard's file by its size in ``found``, or None."""
    path = folder / shard.file
    if shard.file not in found:
        return f"{path} is missing"
    size = found[shard.file]
    damage = f"{path} is damaged: {size} bytes, written with {shard.bytes}"
    return None if size == shard.bytes else damage


def check(folder: str | os.PathLike) -> Iterator[tuple[Shard, str | None]]:
    """Yield each shard with what is wrong with it, or None, by the checksum of the whole file."""
    folder = located(folder)
    found = sizes(folder)
    for shard in Manifest.read(folder).shards:
        trouble = quick_check(folder, shard, found)
        if trouble is None and sha256(folder / shard.file) != shard.sha256:
            trouble = f"{folder / shard.file} is damaged: its checksum differs from the manifest's"
        yield shard, trouble


class Records:
    """Random access, from any thread, to the records of a folder, numbered through its shards.
    expected: entries that the shards' identity must have. cache_gb: of local disk for the shards of
    a bucket. starts: the number of each shard's first record, and of all records."""

    def __init__(
        self,
        folder: str | os.PathLike,
        expected: Mapping[str, str] | None = None,
        cache_gb: float = CACHE_GB,
    ):
        self.folder = located(folder)
        self.manifest = Manifest.read(self.folder)
        check_identity(self.folder, self.manifest.identity, expected or {})
        found, shards = sizes(self.folder), self.manifest.shards
        for shard in shards:
            if trouble := quick_check(self.folder, shard, found):
                raise UserError(f"{trouble}; delete the file and encode again: the rest stays")
        self.starts = np.cumsum([0, *(shard.count for shard in shards)])
        self.cache = None
        if isinstance(self.folder, RemotePath):
            self.cache = ShardCache(self.folder, shards, cache_gb)
        most = _OPEN if self.cache is None else min(_OPEN, self.cache.open_at_most)
        # a thread that still reads from a reader that the cache drops keeps it
        self._reader = functools.lru_cache(most)(self._open_reader)

    def __len__(self) -> int:
        return self.manifest.samples

    def shard_of(self, index: int) -> tuple[int, int]:
        """(number of the shard, place in it) of a record."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return shard, int(index - self.starts[shard])

    def shards_of(self, indices: np.ndarray) -> list[int]:
        """Numbers of the shards that hold these records, in the order of the first of each."""
        found = np.searchsorted(self.starts, indices, side="right") - 1
        return list(dict.fromkeys(found.tolist()))

    def bytes(self, index: int) -> bytes:
        """The bytes of a record. Raises UserError with shard and record if they are damaged."""
        shard, place = self.shard_of(index)
        try:
            return self._reader(shard).read([place])[0]
        except (RuntimeError, IndexError, ValueError) as error:
            path = self.folder / self.manifest.shards[shard].file
            raise UserError(f"{path}, record {place}, is damaged: {one_line(error)}") from None

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return decode_record(self.bytes(range(len(self))[index]))

    def _open_reader(self, shard: int) -> Any:
        from array_record.python import array_record_module

        path = self.folder / self.manifest.shards[shard].file
        options = "readahead_buffer_size:0,max_parallelism:0"
        path = path if self.cache is None else self.cache.path(shard)
        return array_record_module.ArrayRecordReader(str(path), options)

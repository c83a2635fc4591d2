"""Encoded samples on disk: ArrayRecord shards of safetensors records, and the manifest that vouches
for them.

    folder/manifest.json            who encoded what, every shard's bucket, count, size and checksum
    folder/00000-64x64.array_record one bucket a shard, so a record's bucket is its shard's

A record is the bytes of a safetensors file: named arrays (bfloat16 included) and text metadata. The
manifest is written last and at once; a folder without one is unfinished work. Readers refuse shards
that another encoder made, that are missing or cut short (by size, when opened) and damaged records
(by Riegeli's chunk hash, when read), each by name; :func:`check` compares whole files with their
checksums.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from pixart_jax.data.reused_memory import keep_freed_memory
from pixart_jax.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
# shards open at a time: a set of millions of pictures has more than a process may open, and to open
# one costs 0.2 ms
_OPEN = 256
_CODES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}
_NAMES = {dtype: code for code, dtype in _CODES.items()}


# ---- one record
# ---------------------------------------------------------------------------------------------


def encode_record(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Named arrays and texts as the bytes of a safetensors file; the same input gives the same
    bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    chunks, end = [], 0
    # Wide types first, as safetensors does, so that every array lies aligned.
    for name, array in sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        array = np.asarray(array, order="C")
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        chunks.append(array.tobytes())
        end += array.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((struct.pack("<Q", len(text)), text, *chunks))


def decode_record(
    record: bytes, names: Iterable[str] | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a record; the arrays are read-only views into it. names: only these
    arrays, all by default."""
    (length,) = struct.unpack_from("<Q", record)
    header = json.loads(record[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for name in header if names is None else names:
        entry = header[name]
        begin, end = entry["data_offsets"]
        dtype = _CODES[entry["dtype"]]
        arrays[name] = np.frombuffer(
            record, dtype, (end - begin) // dtype.itemsize, 8 + length + begin
        ).reshape(entry["shape"])
    return arrays, metadata


# ---- one shard
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shard:
    """What the manifest says of a shard. bucket: (height, width) in px; longest: tokens of its
    longest text by caption kind;
    skipped: (key, reason) of the samples that could not be encoded; lacking: caption kind → places
    of the records that have no text of it, where their pictures have some but not all kinds."""

    file: str
    bucket: tuple[int, int]
    count: int
    bytes: int
    sha256: str
    longest: Mapping[str, int] = dataclasses.field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()
    lacking: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, fields: Mapping) -> Shard:
        lacking = {kind: tuple(places) for kind, places in fields.get("lacking", {}).items()}
        return cls(
            **{
                **fields,
                "bucket": tuple(fields["bucket"]),
                "skipped": tuple(map(tuple, fields["skipped"])),
                "lacking": lacking,
            }
        )


def sha256(path: pathlib.Path) -> str:
    """Checksum of a whole file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> int:
    """Write records to an ArrayRecord file that appears under its name only when complete and on
    disk; returns their count."""
    from array_record.python import array_record_module

    # what a killed run left under this name is overwritten
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    # One record a group is what random access wants; the arrays are noise to a compressor.
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
    _publish(partial, path)
    return count


def write_json(path: pathlib.Path, value: object) -> None:
    """Write JSON that appears under its name only when complete and on disk."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file that appears under its name only when complete and on disk."""
    # several processes may say the same
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    partial.write_text(text, encoding="utf-8")
    _publish(partial, path)


def _publish(partial: pathlib.Path, path: pathlib.Path) -> None:
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


# ---- the manifest
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Manifest:
    """identity: what the records were made with, name → text (encoders' hashes, source, buckets,
    caption kinds, token cap).
    made_from: which files the encoders were opened from, encoder → {"files", "dtype"}, empty where
    nobody said; the same identity may come of other files (a copy of another format), so this is no
    part of it."""

    identity: Mapping[str, str]
    shards: tuple[Shard, ...]
    made_from: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)

    @property
    def samples(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def longest(self) -> dict[str, int]:
        """Caption kind → tokens of its longest text."""
        kinds = {kind for shard in self.shards for kind in shard.longest}
        return {
            kind: max(shard.longest.get(kind, 0) for shard in self.shards) for kind in sorted(kinds)
        }

    @property
    def by_bucket(self) -> dict[tuple[int, int], int]:
        """(height, width) → records, in the order of the shards."""
        counts: dict[tuple[int, int], int] = {}
        for shard in self.shards:
            counts[shard.bucket] = counts.get(shard.bucket, 0) + shard.count
        return counts

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [entry for shard in self.shards for entry in shard.skipped]

    def write(self, folder: pathlib.Path) -> None:
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        said = {
            "identity": dict(self.identity),
            "made_from": {part: dict(how) for part, how in self.made_from.items()},
        }
        write_json(
            folder / MANIFEST, {"format": FORMAT, **said, "samples": self.samples, "shards": shards}
        )

    @classmethod
    def read(cls, folder: str | os.PathLike) -> Manifest:
        """The manifest of a folder; UserError where there is none, or it cannot be read."""
        path = pathlib.Path(folder) / MANIFEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} holds no {MANIFEST}: not a folder of encoded shards, or encoding has "
                "not finished"
            ) from None
        except (OSError, ValueError) as fault:
            raise UserError(f"{path} cannot be read: {fault}") from None
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise UserError(f"{path} has a format this version does not read: encode the set again")
        try:
            return cls(
                fields["identity"],
                tuple(Shard.from_json(shard) for shard in fields["shards"]),
                fields.get("made_from", {}),
            )
        except (KeyError, TypeError) as fault:
            raise UserError(f"{path} is damaged: {fault!r}") from None


def check_identity(
    folder: str | os.PathLike, found: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    """Raise UserError that names what differs, where shards were not made with what is expected of
    them."""

    def brief(value):
        return "nothing" if value is None else value if len(value) <= 60 else f"{value[:12]}…"

    wrong = [
        f"{name} is {brief(found.get(name))}, expected {brief(value)}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if wrong:
        raise UserError(
            f"{folder} was encoded with something else: {'; '.join(wrong)}. Give another folder, "
            "or encode again"
        )


def quick_check(folder: pathlib.Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file at a glance, or None."""
    path = folder / shard.file
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing"
    return (
        None
        if size == shard.bytes
        else f"{path} is damaged: {size} bytes, written with {shard.bytes}"
    )


def check(folder: str | os.PathLike) -> Iterator[tuple[Shard, str | None]]:
    """Each shard with what is wrong with it (None: nothing), every byte compared with the
    manifest's checksum."""
    folder = pathlib.Path(folder)
    for shard in Manifest.read(folder).shards:
        trouble = quick_check(folder, shard)
        if trouble is None and sha256(folder / shard.file) != shard.sha256:
            trouble = f"{folder / shard.file} is damaged: its checksum differs from the manifest's"
        yield shard, trouble


class Records:
    """Random access to the records of a folder, numbered through its shards; threads may read at
    once.

    expected: entries of the identity that the shards must have been made with.
    """

    def __init__(self, folder: str | os.PathLike, expected: Mapping[str, str] | None = None):
        self.folder = pathlib.Path(folder)
        self.manifest = Manifest.read(self.folder)
        check_identity(self.folder, self.manifest.identity, expected or {})
        for shard in self.manifest.shards:
            if trouble := quick_check(self.folder, shard):
                raise UserError(
                    f"{trouble}; delete the file and encode again: only what is missing is made "
                    "anew"
                )
        self._starts = np.cumsum([0, *(shard.count for shard in self.manifest.shards)])
        # those open, the latest used last
        self._readers: collections.OrderedDict[int, object] = collections.OrderedDict()
        self._opening = threading.Lock()
        keep_freed_memory()

    def __len__(self) -> int:
        return self.manifest.samples

    def shard_of(self, index: int) -> tuple[int, int]:
        """(number of the shard, place in it) of a record."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return shard, int(index - self._starts[shard])

    def bytes(self, index: int) -> bytes:
        """The bytes of a record; UserError names the shard and the record where they are
        damaged."""
        shard, place = self.shard_of(index)
        try:
            return self._reader(shard).read([place])[0]
        except (RuntimeError, IndexError, ValueError) as fault:
            path = self.folder / self.manifest.shards[shard].file
            raise UserError(
                f"{path}, record {place}, is damaged: {' '.join(str(fault).split())[:160]}"
            ) from None

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return decode_record(self.bytes(range(len(self))[index]))

    def _reader(self, shard: int):
        with self._opening:
            reader = self._readers.pop(shard, None)
            if reader is None:
                from array_record.python import array_record_module

                path = str(self.folder / self.manifest.shards[shard].file)
                reader = array_record_module.ArrayRecordReader(
                    path, "readahead_buffer_size:0,max_parallelism:0"
                )
            self._readers[shard] = reader
            if len(self._readers) > _OPEN:  # a thread that still reads from it keeps it
                self._readers.popitem(last=False)
            return reader

"""Captions to where they are wanted: .txt files in a folder or beside the pictures, or members of
webdataset tars."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources.tar_index import PICTURES
from pixart_jax.errors import UserError


class CaptionsByKey:
    """The captions of a caption file by key; memory for 16 bytes a caption, the texts stay in the
    file."""

    def __init__(self, file: Path):
        hashes, places, place = [], [], 0
        with open(file, "rb") as lines:
            for line in lines:
                hashes.append(_hash(json.loads(line)["key"]))
                places.append(place)
                place += len(line)
        self._hashes, self._places = np.array(hashes, np.uint64), np.array(places, np.int64)
        order = np.argsort(self._hashes, kind="stable")
        self._hashes, self._places = self._hashes[order], self._places[order]
        self._file = open(file, "rb")

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, key: str) -> str | None:
        at = int(np.searchsorted(self._hashes, np.uint64(_hash(key))))
        while at < len(self._hashes) and self._hashes[at] == _hash(key):
            self._file.seek(int(self._places[at]))
            row = json.loads(self._file.readline())
            if row["key"] == key:
                return row["caption"]
            at += 1
        return None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(key, caption), in the order of the file."""
        self._file.seek(0)
        for line in self._file:
            row = json.loads(line)
            yield row["key"], row["caption"]


def _hash(key: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )


# ---- .txt files ----


def to_texts(
    captions: CaptionsByKey, folder: Path, suffix: str, faults: BadRecords, replace: bool
) -> int:
    """KEY + suffix in ``folder`` for every caption, each file written whole; how many. replace: a
    file that is there may be overwritten (an --out of our own); else one that says something else
    is named and left as it is."""
    written = 0
    root = folder.resolve()
    for key, caption in captions:
        file = folder / f"{key}{suffix}"
        if "\0" in key or not file.resolve().is_relative_to(root):
            faults.add(key, "unusable key", "it leads out of the folder")
            continue
        data = f"{caption}\n".encode()
        if file.is_file():
            if file.read_bytes() == data:
                written += 1
                continue
            if not replace:
                faults.add(str(file), "file in the way", "it says something else")
                continue
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_name(f".{file.name}.new")
        fresh.write_bytes(data)
        os.replace(fresh, file)
        written += 1
    return written


# ---- webdataset tars ----


def to_tars(
    captions: CaptionsByKey,
    files: list[Path],
    folder: Path | None,
    kind: str,
    faults: BadRecords,
    newer_than: int = 0,
) -> int:
    """Copies of the tars with a member KEY.kind.txt after each sample's own; how many captions they
    hold.

    The members that were there are copied byte for byte. folder: where the copies go; None replaces
    the originals, each at once and whole. newer_than: a copy that was written after this time (ns)
    is whole and stays. A tar that is cut keeps what is before the cut, and is named.
    """
    from tqdm import tqdm

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        names = [file.name for file in files]
        if len(set(names)) < len(names):
            raise UserError("two of the tars have the same name: caption their folders one by one")
        if any(file.resolve().parent == folder.resolve() for file in files):
            raise UserError(
                f"{folder} is the folder of the tars themselves: another --out, or --in-place to "
                "replace them"
            )
    held, seen = 0, set()
    for file in tqdm(files, desc="tars", unit=" tars", disable=len(files) < 2):
        out = file if folder is None else folder / file.name
        members, end = _members(file, faults)
        # A key that an earlier tar has too is TAR/KEY to the source.
        keys = {_key(member.name) for member in members if _suffix(member.name) in PICTURES}
        names = {key: f"{file.stem}/{key}" if _hash(key) in seen else key for key in keys}
        seen.update(map(_hash, keys))
        if folder is not None and out.is_file() and out.stat().st_mtime_ns > newer_than > 0:
            held += _count(out, kind)
        else:
            held += _rewrite(captions, file, out, members, end, names, kind)
    return held


def _rewrite(
    captions: CaptionsByKey,
    file: Path,
    out: Path,
    members: list[tarfile.TarInfo],
    end: int,
    names: dict[str, str],
    kind: str,
) -> int:
    # a sample's last member
    last = {_key(member.name): place for place, member in enumerate(members)}
    there = {member.name: member for member in members}
    fresh, held, added = out.with_name(f".{out.name}.new"), 0, 0
    with open(file, "rb") as old, open(fresh, "wb") as new:
        for place, member in enumerate(members):
            stop = members[place + 1].offset if place + 1 < len(members) else end
            _copy(old, new, member.offset, stop)
            key = _key(member.name)
            if last[key] != place:
                continue
            text = captions.get(names[key]) if key in names else None
            if text is None:
                continue
            name, data = f"{key}.{kind}.txt", text.encode()
            if name in there:
                old.seek(there[name].offset_data)
                if old.read(there[name].size) != data:
                    raise UserError(
                        f"{file} has a member {name} that says something else: another --kind"
                    )
                held += 1
                continue
            held, added = held + 1, added + 1
            new.write(_member(name, data))
        new.write(bytes(1024))
        new.write(bytes(-new.tell() % tarfile.RECORDSIZE))
        new.flush()
        os.fsync(new.fileno())
    if out == file and not added:
        fresh.unlink()
    else:
        os.replace(fresh, out)
    return held


def _members(file: Path, faults: BadRecords) -> tuple[list[tarfile.TarInfo], int]:
    """The whole members of a tar and where the last one ends, in bytes."""
    size, members, end = file.stat().st_size, [], 0
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                stop = (
                    member.offset_data + -(-member.size // 512) * 512
                    if member.isreg()
                    else member.offset_data
                )
                if stop > size:
                    faults.add(str(file), "cut file", f"in its member {member.name}")
                    return members, end
                members.append(member)
                end = stop
    except (tarfile.TarError, OSError, EOFError) as fault:
        if not members:
            raise UserError(
                f"{file} is no plain tar, so that nothing can be added to it: {fault}"
            ) from None
        faults.add(str(file), "cut file", str(fault))
    return members, end


def _copy(old, new, start: int, stop: int) -> None:
    old.seek(start)
    while start < stop:
        data = old.read(min(1 << 20, stop - start))
        if not data:
            raise UserError(f"{old.name} was cut while it was read")
        new.write(data)
        start += len(data)


def _member(name: str, data: bytes) -> bytes:
    """A member as tar writes it: headers, data, padding."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    buffer = io.BytesIO()
    buffer.write(info.tobuf(tarfile.PAX_FORMAT))
    buffer.write(data + bytes(-len(data) % 512))
    return buffer.getvalue()


def _key(name: str) -> str:
    """webdataset's rule: up to the first dot of the file's own name."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()


def _count(file: Path, kind: str) -> int:
    with tarfile.open(file, "r:") as tar:
        return sum(name.endswith(f".{kind}.txt") for name in tar.getnames())

"""Captions of a caption file to .txt files, or into copies of webdataset tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from pixart_jax.captioning.log import read_lines
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.images import PICTURES
from pixart_jax.data.sources.webdataset import whole_members
from pixart_jax.errors import UserError
from pixart_jax.files import atomic_write


def to_texts(file: Path, folder: Path, suffix: str, faults: BadRecords, replace: bool) -> int:
    """Write KEY + suffix in ``folder`` for every caption of ``file``, each atomically; return how
    many are there. replace: overwrite a file that exists (an --out of our own); otherwise one with
    another text is named and stays as it is."""
    written = 0
    for row in read_lines(file):
        path, data = folder / f"{row['key']}{suffix}", f"{row['caption']}\n".encode()
        if "\0" in row["key"] or not path.resolve().is_relative_to(folder.resolve()):
            faults.add(row["key"], "unusable key", "it leads out of the folder")
            continue
        if not path.is_file() or path.read_bytes() != data:
            if path.is_file() and not replace:
                faults.add(str(path), "file in the way", "it says something else")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as out:
                out.write(data)
        written += 1
    return written


def to_tars(
    file: Path, tars: list[Path], folder: Path, kind: str, faults: BadRecords
) -> tuple[int, int]:
    """Copy the tars into ``folder`` with a member KEY.kind.txt after each sample's own; return how
    many captions the copies and ``file`` hold.

    A copy that is newer than ``file`` is complete and stays. A cut tar is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if len({tar.name for tar in tars}) < len(tars):
        raise UserError("two of the tars have the same name: caption their folders one by one")
    if any(tar.resolve().parent == folder.resolve() for tar in tars):
        raise UserError(f"{folder} is the folder of the tars themselves: give another --out")
    held, seen = 0, set()
    with open(file, "rb") as lines:
        places, place = {}, 0  # of each key's row; the texts stay in the file
        for line in lines:
            places[json.loads(line)["key"]] = place
            place += len(line)

        def caption(key: str) -> str | None:
            if key not in places:
                return None
            lines.seek(places[key])
            return json.loads(lines.readline())["caption"]

        for tar in tqdm(tars, desc="tars", unit=" tars", disable=len(tars) < 2):
            members = list(whole_members(tar, faults))
            if not members:
                raise UserError(f"{tar} is not an uncompressed tar: nothing can be added to it")
            names = [_sample(m.name) for m in members if _suffix(m.name) in PICTURES]
            # a key that an earlier tar has too is TAR/KEY to the source
            keys = {name: f"{tar.stem}/{name}" if name in seen else name for name in names}
            seen |= set(names)
            copy = folder / tar.name
            if not copy.exists() or copy.stat().st_mtime_ns <= file.stat().st_mtime_ns:
                _copy(tar, members, copy, caption, keys, kind)
            with tarfile.open(copy) as made:
                held += sum(name.endswith(f".{kind}.txt") for name in made.getnames())
    return held, len(places)


def _copy(
    tar: Path,
    members: list[tarfile.TarInfo],
    copy: Path,
    caption: Callable[[str], str | None],
    keys: Mapping[str, str],
    kind: str,
) -> None:
    """caption: of a key. keys: a sample's name in the tar → its key in the source."""
    last = {_sample(member.name): member for member in members}
    there = {member.name: member for member in members}
    with (
        tarfile.open(tar) as old,
        atomic_write(copy) as out,
        tarfile.open(fileobj=out, mode="w") as new,
    ):

        def contents(member: tarfile.TarInfo):
            return old.extractfile(member) if member.isreg() else None

        for member in members:
            new.addfile(member, contents(member))
            name = _sample(member.name)
            text = caption(keys[name]) if name in keys and last[name] is member else None
            if text is None:
                continue
            info, data = tarfile.TarInfo(f"{name}.{kind}.txt"), text.encode()
            info.size = len(data)
            if info.name not in there:
                new.addfile(info, io.BytesIO(data))
            elif contents(there[info.name]).read() != data:
                raise UserError(
                    f"{tar} has a member {info.name} that says something else: another --kind"
                )


def _sample(name: str) -> str:
    """webdataset's rule: up to the first dot of the file's own name."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _suffix(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2].lower()

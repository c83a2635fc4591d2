"""Webdataset tars, as img2dataset writes them: read at random, by an index of where each member
lies."""

from __future__ import annotations

import concurrent.futures
import contextlib
import glob
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import texts
from pixart_jax.data.sources.filters import LazyFields
from pixart_jax.data.sources.listed import READERS, IndexedSource
from pixart_jax.data.sources.sample import Sample
from pixart_jax.data.sources.strings import StringIndex, StringTable
from pixart_jax.data.sources.tar_index import PICTURES, TarIndex, index, kind
from pixart_jax.errors import UserError


class WebdatasetSource(IndexedSource):
    """Samples of tars; ``pattern`` is a tar, a folder of them, or their names with {000..012},
    {a,b} or * in it.

    A sample is a picture (jpg, jpeg, png, webp …) with what shares its name up to the first dot:
    .txt is the kind 'caption', .KIND.txt that kind, .json's texts each a kind of its name and its
    other fields what filters see, .cls the class. Its key is that name; where an earlier tar of the
    set has it too, the name behind the tar's. Tars are read where they lie, uncompressed.
    """

    def __init__(
        self,
        pattern: str,
        *,
        where: str | None = None,
        limit: int | None = None,
        faults: BadRecords | None = None,
    ):
        self.faults = BadRecords() if faults is None else faults
        self._tars = tars_of(pattern, self.faults)
        inside = pathlib.Path(pattern)
        self.name = f"webdataset:{inside.resolve().name if inside.is_dir() else inside.name}"
        parts = self._indices()
        self._keys = self._named(parts)
        self._starts = np.cumsum([0, *(len(part.keys) for part in parts)])
        self._parts = parts
        for part in parts:
            part.keys.clear()  # they are in one block now
        self.caption_kinds = tuple(dict.fromkeys(name for part in parts for name in part.kinds))
        greatest = max((int(part.label.max()) for part in parts if len(part.label)), default=-1)
        self.num_classes = greatest + 1 if greatest >= 0 else None
        state = [[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in self._tars]
        self._choose(len(self._keys), ["webdataset", state], where, limit)

    def _indices(self) -> list[TarIndex]:
        """The index of every tar that can be read; the others are named."""
        parts, kept = [], []
        with (
            concurrent.futures.ThreadPoolExecutor(READERS) as readers,
            tqdm(
                total=len(self._tars),
                desc=f"headers of {self.name}",
                unit=" tars",
                delay=2,
                leave=False,
            ) as bar,
        ):
            for tar, made in zip(
                self._tars, [readers.submit(index, tar) for tar in self._tars], strict=True
            ):
                try:
                    part = made.result()
                except OSError as fault:
                    self.faults.add(tar.name, "unreadable file", str(fault))
                    continue
                self.faults.extend(part.faults)
                parts.append(part)
                kept.append(tar)
                bar.update()
        self._tars = kept
        return parts

    def _named(self, parts: list[TarIndex]) -> StringTable:
        plain = StringTable(itertools.chain.from_iterable(part.keys for part in parts))
        repeats = StringIndex(plain).repeats()
        if not repeats.any():
            return plain
        tars = (tar.stem for tar, part in zip(self._tars, parts) for _ in part.keys)
        return StringTable(
            f"{tar}/{key}" if again else key for key, tar, again in zip(plain, tars, repeats)
        )

    def _at(self, place: int) -> tuple[int, int]:
        """(number of the tar, number of the sample in it)."""
        tar = int(np.searchsorted(self._starts, place, side="right")) - 1
        return tar, place - int(self._starts[tar])

    def _members(self, place: int) -> dict[str, tuple[pathlib.Path, int, int]]:
        """suffix → (file, offset, size)."""
        tar, number = self._at(place)
        part = self._parts[tar]
        return {
            part.suffixes[part.suffix[m]]: (self._tars[tar], int(part.offset[m]), int(part.size[m]))
            for m in range(int(part.first[number]), int(part.first[number + 1]))
        }

    def _named_member(self, place: int, suffix: str) -> str:
        return f"{self._tars[self._at(place)[0]].name}, {self._keys[place]}.{suffix}"

    # ---- a sample ----

    def _key(self, place: int) -> str:
        return self._keys[place]

    @contextlib.contextmanager
    def _picture(self, place: int):
        members = self._members(place)
        with open(members[_picture_of(members)][0], "rb", buffering=0) as tar:
            _, offset, size = members[_picture_of(members)]
            yield io.BufferedReader(_Part(tar, offset, size))

    def _json(self, place: int, members) -> dict[str, object]:
        if "json" not in members:
            return {}
        try:
            found = json.loads(_bytes(*members["json"]).decode("utf-8-sig", "replace"))
        except (ValueError, RecursionError) as fault:
            self.faults.add(self._named_member(place, "json"), "unreadable row", str(fault))
            return {}
        return found if isinstance(found, dict) else {}

    def _captions(self, place: int, members, side: dict[str, object]) -> dict[str, tuple[str, ...]]:
        found = []
        for suffix, where in members.items():
            if suffix == "txt" or suffix.endswith(".txt"):
                text = texts.decoded(
                    _bytes(*where), self._named_member(place, suffix), kind(suffix), self.faults
                )
                if text:
                    found.append({kind(suffix): (text,)})
        return texts.merged(
            *found, texts.captions_of(side, self._named_member(place, "json"), self.faults)
        )

    def _label(self, place: int, side: dict[str, object]) -> int:
        tar, number = self._at(place)
        label = int(self._parts[tar].label[number])
        return label if label >= 0 else texts.label_of(side)

    def _sample(self, place: int) -> Sample:
        members = self._members(place)
        side = self._json(place, members)
        image = _bytes(*members[_picture_of(members)])
        return Sample(
            self._keys[place], image, self._captions(place, members, side), self._label(place, side)
        )

    def captions_at(self, index: int) -> tuple[str, dict[str, tuple[str, ...]]]:
        """(key, captions) of a sample, for whoever counts words: the picture is not read."""
        members = self._members(place := self._place(index))
        return self._keys[place], self._captions(place, members, self._json(place, members))

    def _fields(self, place: int) -> LazyFields:
        members = self._members(place)
        side = self._json(place, members)

        def caption(name):
            found = self._captions(place, members, side)[name]
            return found[0] if len(found) == 1 else found

        made = {name: lambda name=name: caption(name) for name in self.caption_kinds}
        made |= {"captions": lambda: self._captions(place, members, side)}
        made |= {"height": lambda: self._size(place)[0], "width": lambda: self._size(place)[1]}
        said = {name: value for name, value in side.items() if name not in ("height", "width")}
        return LazyFields(
            {**said, "key": self._keys[place], "label": self._label(place, side)}, made
        )


def _picture_of(members) -> str:
    return next(suffix for suffix in members if suffix in PICTURES)


def _bytes(tar: pathlib.Path, offset: int, size: int) -> bytes:
    """UserError where the file is gone or shorter than it was."""
    try:
        with open(tar, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as fault:
        raise UserError(f"{tar} cannot be read: {fault.strerror}") from None
    if len(data) != size:
        raise UserError(
            f"{tar} has become shorter since it was opened: {size} bytes at {offset:,} are not "
            "there"
        )
    return data


class _Part(io.RawIOBase):
    """Bytes ``offset`` to ``offset + size`` of an open file, as a file."""

    def __init__(self, file, offset: int, size: int):
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(
            0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        )
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        data = os.pread(
            self._file.fileno(),
            max(0, min(len(buffer), self._size - self._at)),
            self._offset + self._at,
        )
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def tars_of(pattern: str, faults: BadRecords) -> list[pathlib.Path]:
    """The tars that a pattern means, in its order; those of a range that are not there are
    named."""
    if re.match(r"[a-z0-9]+://|pipe:", pattern):
        raise UserError(
            f"webdataset:{pattern}: tars are read at random, from a disk; copy them to one first"
        )
    if pathlib.Path(pattern).is_dir():
        found = sorted(pathlib.Path(pattern).glob("*.tar"))
        if not found:
            raise UserError(f"webdataset:{pattern}: the folder holds no .tar")
        return found
    found = []
    for name in _braces(pattern):
        if re.search(r"\.(tgz|tar\.\w+)$", name):
            raise UserError(
                f"webdataset:{name}: a compressed tar cannot be read at random: unpack it to .tar"
            )
        matches = (
            sorted(glob.glob(name))
            if any(c in name for c in "*?[") and not os.path.exists(name)
            else [name]
        )
        for path in map(pathlib.Path, matches):
            if path.is_file():
                found.append(path)
            else:
                faults.add(str(path), "missing file")
    if not found:
        raise UserError(f"webdataset:{pattern}: no such tar")
    return found


def _braces(pattern: str) -> Iterator[str]:
    """'a{00..11}.tar' → a00.tar … a11.tar; '{a,b}' likewise; several multiply."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        yield pattern
        return
    first, last, names = found.groups()
    if names is None:
        if int(last) < int(first):
            raise UserError(f"webdataset:{pattern}: the range {first}..{last} runs backwards")
        choices = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = names.split(",")
    for choice in choices:
        yield from _braces(pattern[: found.start()] + choice + pattern[found.end() :])

"""A folder of pictures, and whatever says what is on them: texts beside them, or tables."""

from __future__ import annotations

import array
import hashlib
import json
import os
import pathlib
import posixpath
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import rows, texts
from pixart_jax.data.sources.filters import LazyFields
from pixart_jax.data.sources.listed import IndexedSource
from pixart_jax.data.sources.sample import Sample
from pixart_jax.data.sources.strings import StringIndex, StringTable
from pixart_jax.errors import UserError

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_TABLES = ("captions", "metadata")  # .jsonl, .csv, .tsv or .parquet: found by themselves
_LOOKED_AT = 500  # side files whose JSON is read to learn which kinds of text there are


class FolderSource(IndexedSource):
    """Pictures in a folder and all below it; hidden ones do not count.

    A picture's key is its path without the suffix. Its captions are
      NAME.txt          the kind 'caption'; NAME.KIND.txt that kind; NAME.json, each text in it (as
      img2dataset writes files) captions.jsonl, .csv, .tsv, .parquet, or metadata.* (Hugging Face's
      imagefolder), in the folder or one below: every column of
                        texts is a kind, a list is several captions; 'key', 'file', 'file_name' or
                        'path' names the picture, from the file's own folder or from the root; an
                        integer 'label' is the class
      the files given as ``tables`` in place of the last. Rows of one picture that bring different
      kinds are put together.
    Named and left out: a second picture of one key, captions without a picture, a second row of one
    picture and kind, captions of more than 100 KB, rows that cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        where: str | None = None,
        limit: int | None = None,
        faults: BadRecords | None = None,
        tables: Sequence[str] = (),
    ):
        self._root = pathlib.Path(root)
        if not self._root.is_dir():
            raise UserError(f"folder {str(root)!r}: no such folder")
        self.faults = BadRecords() if faults is None else faults
        self.name = f"folder:{self._root.resolve().name}"
        self._keys, self._suffixes = StringTable(), []
        self._suffix_of = array.array("H")
        seal = hashlib.sha256()
        beside, found = self._scan(seal)
        if not len(self._keys):
            raise UserError(f"{self.name} holds no picture ({', '.join(PICTURES)}): {root}")
        numbers = self._once()
        self._side_suffixes: list[str] = []  # of side files: '.txt', '.dense.txt', '.json'
        self._side_of = np.zeros(len(self._keys), np.uint64)  # a bit for each of them
        self._add_beside(beside, numbers)
        self._rows, self._row_of = StringTable(), np.full(len(self._keys), -1, np.int64)
        kinds: dict[str, None] = {}
        labels = -1
        for table in [self._given(table) for table in tables] or found:
            seal.update(
                repr(
                    (
                        os.path.relpath(table, self._root),
                        table.stat().st_size,
                        table.stat().st_mtime_ns,
                    )
                ).encode()
            )
            labels = max(labels, self._add_rows(table, numbers, kinds))
        self.caption_kinds = tuple(dict.fromkeys([*self._kinds_beside(), *kinds]))
        self.num_classes = labels + 1 if labels >= 0 else None
        self._choose(len(self._keys), ["folder", seal.hexdigest()], where, limit)

    # ---- what lies there ----

    def _scan(self, seal) -> tuple[StringTable, list[pathlib.Path]]:
        """Keys of the pictures; (paths of side files, tables). Paths are relative to the root, with
        '/'."""
        beside, tables = StringTable(), []
        for path, entry in _walk(str(self._root), ""):
            stem, suffix = posixpath.splitext(path)
            kind = suffix.lower()
            if kind not in PICTURES and kind not in (".txt", ".json") and not _is_table(path):
                continue
            try:
                status = entry.stat()
                path.encode("utf-8")
            except OSError as fault:
                self.faults.add(path, "unreadable file", str(fault))
                continue
            except UnicodeEncodeError:
                self.faults.add(
                    path.encode("utf-8", "replace").decode(), "unusable file name", "not UTF-8"
                )
                continue
            if kind in PICTURES:
                self._keys.append(stem)
                if suffix not in self._suffixes:
                    self._suffixes.append(suffix)
                self._suffix_of.append(self._suffixes.index(suffix))
            elif _is_table(path):
                tables.append(self._root / path)
                continue
            elif kind == ".txt" and status.st_size > texts.LONGEST:
                self.faults.add(
                    path,
                    "caption too long",
                    f"{status.st_size:,} bytes, at most {texts.LONGEST:,} are taken",
                )
                continue
            else:
                beside.append(path)
            seal.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return beside, tables

    def _once(self) -> StringIndex:
        """Of pictures that share a key the first stays."""
        numbers = StringIndex(self._keys)
        repeats = numbers.repeats()
        if not repeats.any():
            return numbers
        for number in np.flatnonzero(repeats):
            path = self._keys[number] + self._suffixes[self._suffix_of[number]]
            self.faults.add(
                path, "key twice", f"another picture is called {self._keys[number]!r} too"
            )
        kept = np.flatnonzero(~repeats)
        self._suffix_of = array.array("H", [self._suffix_of[i] for i in kept])
        self._keys = StringTable(self._keys[i] for i in kept)
        return StringIndex(self._keys)

    def _add_beside(self, beside: StringTable, numbers: StringIndex) -> None:
        for path in beside:
            stem, suffix = posixpath.splitext(path)
            number = numbers.find(stem)
            # NAME.dense.txt
            if number < 0 and suffix == ".txt" and "." in posixpath.basename(stem):
                stem, kind = posixpath.splitext(stem)
                number, suffix = numbers.find(stem), kind + suffix
            if number < 0:
                if path.endswith(".txt"):
                    self.faults.add(path, "caption without picture")
                continue  # a .json of something else
            if suffix not in self._side_suffixes:
                if len(self._side_suffixes) == 64:
                    raise UserError(
                        f"{self.name}: more than 64 kinds of files beside pictures, the last "
                        f"{path!r}"
                    )
                self._side_suffixes.append(suffix)
            self._side_of[number] |= np.uint64(1 << self._side_suffixes.index(suffix))

    def _kinds_beside(self) -> list[str]:
        kinds = [_kind(suffix) for suffix in sorted(self._side_suffixes) if suffix.endswith(".txt")]
        if ".json" in self._side_suffixes:
            bit = np.uint64(1 << self._side_suffixes.index(".json"))
            quiet = BadRecords()
            for place in np.flatnonzero(self._side_of & bit)[:_LOOKED_AT]:
                kinds += texts.captions_of(self._json(int(place), quiet), "", quiet)
        return kinds

    def _given(self, table: str) -> pathlib.Path:
        for path in (self._root / table, pathlib.Path(table)):
            if path.is_file():
                return path
        raise UserError(f"{self.name}: no caption file {table!r}, neither in the folder nor here")

    def _add_rows(self, table: pathlib.Path, numbers: StringIndex, kinds: dict[str, None]) -> int:
        """Take in a table; returns the greatest label in it, −1 without any."""
        here = posixpath.normpath(os.path.relpath(table.parent, self._root).replace(os.sep, "/"))
        greatest = -1
        for number, row in rows.rows(table, self.faults):
            place = f"{table.name}, row {number}"
            field = next(
                (name for name in texts.FILE_FIELDS if row.get(name) not in (None, "")), None
            )
            if field is None:
                self.faults.add(
                    place,
                    "unreadable row",
                    f"names no picture (a field of {', '.join(texts.FILE_FIELDS[:4])} …)",
                )
                continue
            picture = self._find(str(row[field]), here, numbers)
            if picture < 0:
                self.faults.add(place, "caption without picture", str(row[field]))
            else:
                said = texts.captions_of(row, f"{place}, {row[field]}", self.faults)
                before, known = self._row(picture)
                if self._row_of[picture] >= 0 and not (
                    said.keys() - before.keys() and said.keys().isdisjoint(before)
                ):
                    self.faults.add(place, "key twice", str(row[field]))
                    continue
                kinds.update(dict.fromkeys(said))
                others = {
                    k: v
                    for k, v in row.items()
                    if k not in said and not texts.is_caption(k, v) and _plain(v)
                }
                greatest = max(greatest, texts.label_of(row))
                self._row_of[picture] = len(self._rows)
                self._rows.append(
                    json.dumps([{**before, **said}, {**others, **known}], ensure_ascii=False)
                )
        return greatest

    def _find(self, given: str, here: str, numbers: StringIndex) -> int:
        """The number of the picture that a row names, −1 where there is none."""
        if os.path.isabs(given):
            given = os.path.relpath(given, self._root.resolve())
        given = posixpath.normpath(given.replace("\\", "/"))
        stem, suffix = posixpath.splitext(given)
        for base in dict.fromkeys((here, ".")):
            for name in (stem, given) if suffix.lower() in PICTURES else (given,):
                number = numbers.find(posixpath.normpath(posixpath.join(base, name)))
                if number >= 0:
                    return number
        return -1

    # ---- a sample ----

    def _key(self, place: int) -> str:
        return self._keys[place]

    def _file(self, place: int) -> pathlib.Path:
        return self._root / (self._keys[place] + self._suffixes[self._suffix_of[place]])

    def _picture(self, place: int):
        return open(self._file(place), "rb")

    def _json(self, place: int, faults: BadRecords) -> dict[str, object]:
        """What NAME.json says."""
        if (
            ".json" not in self._side_suffixes
            or not int(self._side_of[place]) >> self._side_suffixes.index(".json") & 1
        ):
            return {}
        file = f"{self._keys[place]}.json"
        try:
            found = json.loads((self._root / file).read_bytes().decode("utf-8-sig", "replace"))
        except (OSError, ValueError, RecursionError) as fault:
            faults.add(file, "unreadable row", str(fault))
            return {}
        return found if isinstance(found, dict) else {}

    def _row(self, place: int) -> tuple[dict[str, tuple[str, ...]], dict[str, object]]:
        """(captions, other fields) of the table's row."""
        number = int(self._row_of[place])
        if number < 0:
            return {}, {}
        said, others = json.loads(self._rows[number])
        return {kind: tuple(found) for kind, found in said.items()}, others

    def _captions(self, place: int, side: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
        key, found = self._keys[place], []
        for bit, suffix in enumerate(self._side_suffixes):
            if suffix.endswith(".txt") and int(self._side_of[place]) >> bit & 1:
                file, kind = key + suffix, _kind(suffix)
                try:
                    text = texts.decoded((self._root / file).read_bytes(), file, kind, self.faults)
                except OSError as fault:
                    self.faults.add(file, "unreadable file", str(fault))
                    continue
                if text:
                    found.append({kind: (text,)})
        return texts.merged(
            self._row(place)[0], *found, texts.captions_of(side, f"{key}.json", self.faults)
        )

    def _sample(self, place: int) -> Sample:
        side = self._json(place, self.faults)
        try:
            image = self._file(place).read_bytes()
        except OSError as fault:
            raise images.UnreadableImage(f"{self._keys[place]}: {fault}") from None
        label = max(texts.label_of(self._row(place)[1]), texts.label_of(side))
        return Sample(self._keys[place], image, self._captions(place, side), label)

    def captions_at(self, index: int) -> tuple[str, dict[str, tuple[str, ...]]]:
        """(key, captions) of a sample, for whoever counts words: the picture is not read."""
        place = self._place(index)
        return self._keys[place], self._captions(place, self._json(place, self.faults))

    def _fields(self, place: int) -> LazyFields:
        side, row = self._json(place, self.faults), self._row(place)[1]
        label = max(texts.label_of(row), texts.label_of(side))
        said = {}

        def caption(kind):
            if not said:
                said.update(self._captions(place, side))
            found = said[kind]
            return found[0] if len(found) == 1 else found

        made = {kind: lambda kind=kind: caption(kind) for kind in self.caption_kinds}
        made |= {"captions": lambda: self._captions(place, side)}
        made |= {"height": lambda: self._size(place)[0], "width": lambda: self._size(place)[1]}
        return LazyFields({**side, **row, "key": self._keys[place], "label": label}, made)


def _walk(
    folder: str, below: str, seen: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, os.DirEntry]]:
    """(path with '/', entry) of every file, folder by folder in the order of their names; links are
    followed, once round."""
    try:
        here = os.stat(folder)
        with os.scandir(folder) as entries:
            found = sorted(
                (entry for entry in entries if not entry.name.startswith(".")),
                key=lambda entry: entry.name,
            )
    except OSError as fault:
        raise UserError(f"folder {folder!r} cannot be read: {fault.strerror}") from None
    mark = (here.st_dev, here.st_ino)
    if mark in seen:
        return
    for entry in found:
        path = f"{below}{entry.name}"
        if entry.is_dir():
            yield from _walk(entry.path, f"{path}/", seen | {mark})
        else:
            yield path, entry


def _is_table(path: str) -> bool:
    stem, suffix = posixpath.splitext(posixpath.basename(path))
    return stem in _TABLES and suffix.lower() in rows.SUFFIXES


def _kind(suffix: str) -> str:
    """'.txt' → 'caption', '.dense.txt' → 'dense'."""
    return suffix[1:].removesuffix("txt").rstrip(".") or "caption"


def _plain(value: object) -> bool:
    return isinstance(value, (str, int, float, bool)) and not (
        isinstance(value, str) and len(value) > 1000
    )

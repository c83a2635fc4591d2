"""A folder of images with captions beside them, or in tables."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
import re
import warnings
from collections.abc import Callable, Sequence
from typing import BinaryIO

import pyarrow as pa

from pixart_jax import tables
from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import texts
from pixart_jax.data.sources.indexed import Choice, Facts, IndexedSource
from pixart_jax.errors import Notice, UserError
from pixart_jax.remote_path import REQUESTS, Location, RemotePath, located

_TABLES = re.compile(r"captions|metadata|captions_\w+|meta_\w+")  # COCO's, kohya's
_LOOKED_AT = 500  # .json files that are read to find the kinds of captions
_SCHEMA = pa.schema(
    {
        "key": pa.large_string(),
        "suffix": pa.large_string(),  # of the image: '.jpg'
        "beside": pa.large_list(pa.large_string()),  # suffixes of side files: 'dense.txt', 'json'
        "row": pa.large_string(),  # JSON of [captions, other fields] from the tables
    }
)


class FolderSource(IndexedSource):
    """Images in a folder and all below it, hidden ones excluded; a key is the path without the
    suffix. Captions come from

      NAME.txt or .caption (kind 'caption'), NAME.KIND.txt, each text in NAME.json (img2dataset's);
      captions.jsonl, .json, .csv, .tsv, .parquet, or metadata.* (Hugging Face's imagefolder),
        captions_*.json (COCO's), meta_*.json (kohya's), in the folder or below, or the files given.
        Every column of texts is a kind, a list is several captions; 'key', 'file', 'file_name' or
        'path' names the image, from the table's folder or the root; an int 'label' is the class.

    Skipped and named: a second image of one key, captions without an image or over 100 KB,
    unreadable rows; other files are counted by suffix.
    """

    def __init__(self, root: str, choice: Choice, given: Sequence[str] = ()):
        self._root = located(root)
        if not self._root.is_dir():
            raise UserError(f"folder {str(root)!r}: no such folder")
        if isinstance(self._root, RemotePath):
            self.requests = REQUESTS
            message = f"{root}: one request a picture; `encode` makes shards, read in few of them"
            warnings.warn(message, Notice, stacklevel=3)
        self.faults = choice.faults
        self.name = f"folder:{self._root.resolve().name}"
        seal = hashlib.sha256()
        pictures, side_files, found = self._scan(seal)
        if not pictures:
            unread = f" ({self.faults.summary()})" if self.faults.unread else ""
            raise UserError(f"{self.name} holds no picture{unread}: {root}")
        beside = self._attach(side_files, pictures)
        merged: dict[str, tuple[dict, dict]] = {}  # key → (captions, other fields) of its rows
        for table in [self._given(table) for table in given] or found:
            status, path = table.stat(), os.path.relpath(table, self._root)
            seal.update(repr((path, status.st_size, status.st_mtime_ns)).encode())
            self._add_rows(table, pictures, merged)
        columns = [
            list(pictures),
            list(pictures.values()),
            [beside.get(key) for key in pictures],
            [json.dumps(merged[key]) if key in merged else None for key in pictures],
        ]
        self._table = pa.table(columns, _SCHEMA)
        in_tables = (kind for captions, _ in merged.values() for kind in captions)
        self.caption_kinds = tuple(dict.fromkeys([*self._kinds_beside(beside), *in_tables]))
        self._choose(len(pictures), ["folder", seal.hexdigest()], choice)

    def _scan(self, seal) -> tuple[dict[str, str], list[str], list[Location]]:
        """(key → suffix of the images, side files, tables); paths from the root, with '/'."""
        pictures: dict[str, str] = {}
        beside, found = list[str](), list[Location]()
        for path in _files_below(self._root):
            stem, suffix = posixpath.splitext(path)
            kind = suffix.lower().removeprefix(".")
            is_table = f".{kind}" in tables.SUFFIXES and _TABLES.fullmatch(
                posixpath.basename(stem).lower()
            )
            if kind not in (*images.PICTURES, *texts.TEXTS, "json") and not is_table:
                self.faults.add_unread(path)
                continue
            try:
                status = self._file(path).stat()
                path.encode("utf-8")
            except OSError as error:
                self.faults.add(path, "unreadable file", str(error))
                continue
            except UnicodeEncodeError:
                shown = path.encode("utf-8", "replace").decode()
                self.faults.add(shown, "unusable file name", "not UTF-8")
                continue
            if is_table:
                found.append(self._file(path))
                continue
            if kind in texts.TEXTS and status.st_size > texts.LONGEST:
                detail = f"{status.st_size:,} bytes, at most {texts.LONGEST:,} are taken"
                self.faults.add(path, "caption too long", detail, True)
                continue
            if kind not in images.PICTURES:
                beside.append(path)
            elif pictures.setdefault(stem, suffix) != suffix:
                detail = f"another picture is called {stem!r} too"
                self.faults.add(path, "key twice", detail)
            seal.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return pictures, beside, found

    def _file(self, path: str) -> Location:
        """A file by its path from the root, of a bucket as it was listed."""
        root = self._root
        return root.listed(path) if isinstance(root, RemotePath) else root / path

    def _attach(self, beside: list[str], pictures: dict[str, str]) -> dict[str, list[str]]:
        """Key → suffixes of its side files, without the first dot."""
        out: dict[str, list[str]] = {}
        for path in beside:
            stem, suffix = posixpath.splitext(path)
            is_text = suffix.lower() != ".json"
            if stem not in pictures and is_text and "." in posixpath.basename(stem):
                stem = posixpath.splitext(stem)[0]  # NAME.dense.txt
            if stem in pictures:
                out.setdefault(stem, []).append(path[len(stem) + 1 :])
            elif is_text:
                self.faults.add(path, "caption without picture")
            else:
                self.faults.add_unread(path)
        return out

    def _kinds_beside(self, beside: dict[str, list[str]]) -> list[str]:
        suffixes = sorted({suffix for found in beside.values() for suffix in found})
        kinds = [kind for kind in map(texts.kind_of, suffixes) if kind]
        quiet = BadRecords()  # the reader of the sample reports them
        of_json = {k: [s for s in found if s.lower() == "json"] for k, found in beside.items()}
        for key in [key for key, found in of_json.items() if found][:_LOOKED_AT]:
            side, _ = texts.side_files(self._readers(key, of_json[key]), "", quiet)
            kinds += texts.captions_of(side, "", quiet)
        return kinds

    def _given(self, table: str) -> Location:
        for path in (self._root / table, located(table)):
            if path.is_file():
                return path
        raise UserError(f"{self.name}: no caption file {table!r}, neither in the folder nor here")

    def _add_rows(
        self, table: Location, pictures: dict[str, str], merged: dict[str, tuple[dict, dict]]
    ) -> None:
        here = posixpath.normpath(os.path.relpath(table.parent, self._root).replace(os.sep, "/"))
        nameless: list[str] = []
        columns: dict[str, None] = {}
        named = False
        for place, row in tables.rows(table, self.faults.add):
            columns |= dict.fromkeys(row)
            name = texts.image_named(row)
            if name is None and any(isinstance(v, dict) and "path" in v for v in row.values()):
                named = True
                self.faults.add(place, "embedded picture", f"parquet:{table.name} reads it")
                continue
            if name is None:
                nameless.append(place)
                continue
            named, key = True, self._find(name, here, pictures)
            if key is None:
                self.faults.add(place, "caption without picture", name)
                continue
            captions = texts.captions_of(row, f"{place}, {name}", self.faults)
            before, known = merged.get(key, ({}, {}))
            if key in merged and all(set(captions[k]) <= set(before.get(k, ())) for k in captions):
                self.faults.add(place, "key twice", name)
                continue
            others = {
                field: value
                for field, value in row.items()
                if field not in captions and not texts.is_caption(field, value) and _plain(value)
            }
            merged[key] = texts.merged(before, captions), {**others, **known}
        wanted = f"a field of {', '.join(texts.FILE_FIELDS[:4])} …"
        if named:
            for place in nameless:
                self.faults.add(place, tables.BAD_ROW, f"names no picture ({wanted})")
        elif nameless:
            has = ", ".join(columns)
            detail = f"no column names a picture (columns: {has}; wanted: {wanted})"
            self.faults.add(table.name, "unreadable table", detail)

    def _find(self, given: str, here: str, pictures: dict[str, str]) -> str | None:
        """The key of the image that a row names."""
        if os.path.isabs(given):
            given = os.path.relpath(given, self._root.resolve())
        given = posixpath.normpath(given.replace("\\", "/"))
        stem, suffix = posixpath.splitext(given)
        for base in (here, "."):
            is_picture = suffix.lower().removeprefix(".") in images.PICTURES
            for name in (stem, given) if is_picture else (given,):
                key = posixpath.normpath(posixpath.join(base, name))
                if key in pictures:
                    return key
        return None

    def _open(self, place: int) -> BinaryIO:
        return self._file(self._key(place) + self._table["suffix"][place].as_py()).open("rb")

    def _readers(self, key: str, suffixes: Sequence[str]) -> dict[str, Callable[[int], bytes]]:
        """Suffix → a function that reads so many bytes of the file."""

        def read(suffix: str, limit: int) -> bytes:
            with self._file(f"{key}.{suffix}").open("rb") as file:
                return file.read(limit)

        return {suffix: functools.partial(read, suffix) for suffix in suffixes}

    def _facts(self, place: int) -> Facts:
        key = self._key(place)
        readers = self._readers(key, self._table["beside"][place].as_py() or ())
        side, beside = texts.side_files(readers, f"{key}.", self.faults)
        said, others = json.loads(self._table["row"][place].as_py() or "[{}, {}]")
        label = max(texts.label_of(others), texts.label_of(side))
        return Facts(label, {**side, **others}, lambda: texts.merged(said, beside()))


def _files_below(root: Location) -> list[str]:
    """Paths of all files with '/', sorted by folder, but hidden ones; links are followed once."""
    if isinstance(root, RemotePath):
        return sorted(
            (name for name in root.names if not re.search(r"(^|/)\.", name)),
            key=lambda path: path.split("/"),
        )

    def refuse(error: OSError):
        raise UserError(f"folder {error.filename!r} cannot be read: {error.strerror}")

    found = []
    for folder, below, files in os.walk(str(root), onerror=refuse, followlinks=True):
        here = os.path.realpath(folder) + os.sep
        real = {name: os.path.realpath(os.path.join(folder, name)) + os.sep for name in below}
        below[:] = [n for n in below if n[0] != "." and not here.startswith(real[n])]
        inside = os.path.relpath(folder, root).replace(os.sep, "/")
        found += [posixpath.normpath(f"{inside}/{name}") for name in files if name[0] != "."]
    return sorted(found, key=lambda path: path.split("/"))


def _plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= 1000
    return isinstance(value, int | float | bool)

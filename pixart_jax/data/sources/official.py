"""The layout of the official PixArt repositories: images, captions, and where their features lie.

ROOT/partition/data_info.json   a list of {path, height, width, ratio, prompt, …} (PixArt-Σ:
                                ROOT/data_info.json, with further texts, such as sharegpt4v)
InternImgs/ beside InternData/  the images of such a list; also ROOT itself, or a folder in it
ROOT/partition/*.txt            SAM: an image's name a line; ROOT/images/NAME.jpg, captions/NAME.txt
ROOT/caption_feature…, img_vae_features…   text states and latents (data/features.py)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import posixpath
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from pixart_jax import tables
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import texts
from pixart_jax.data.sources.indexed import Choice, Facts, IndexedSource
from pixart_jax.errors import UserError

_LISTS = ("partition", "partition_filter", ".")  # where official loaders look for .json


@dataclasses.dataclass(frozen=True)
class Entry:
    """One image of a list. path: as listed. place: for messages. fields: of the item."""

    path: str
    place: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The folder ``root`` and the ``lists`` that name its images. sam: SAM's partition files."""

    root: pathlib.Path
    lists: tuple[pathlib.Path, ...]
    sam: bool

    @classmethod
    def of(cls, root: str) -> Layout:
        """The layout in ``root``. Raises UserError if there is none."""
        folder = pathlib.Path(root)
        if not folder.is_dir():
            raise UserError(f"pixart:{root}: no such folder")
        # the folder above, as the official set is unpacked
        if not any(folder.glob("partition*")) and (folder / "InternData").is_dir():
            folder = folder / "InternData"
        for place in _LISTS:
            found = sorted((folder / place).glob("data_info.json" if place == "." else "*.json"))
            if found:
                return cls(folder, tuple(found), sam=False)
        found = sorted((folder / "partition").glob("*.txt"))
        if found:
            return cls(folder, tuple(found), sam=True)
        raise UserError(f"pixart:{root} has neither partition/*.json or *.txt nor data_info.json")

    @property
    def text_kind(self) -> str:
        """The caption kind of the features in caption_feature…"""
        return "caption" if self.sam else "prompt"

    def entries(self, faults: BadRecords) -> Iterator[Entry]:
        """The images of the lists, in their order. Items without a path are skipped and named."""
        for file in self.lists:
            yield from (_names if self.sam else _items)(file, faults)


def _items(file: pathlib.Path, faults: BadRecords) -> Iterator[Entry]:
    try:
        text, replaced = tables.decode(file.read_bytes())
        items = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if replaced:
        faults.add(file.name, tables.NOT_UTF8, repaired=True)
    if not isinstance(items, list):
        raise UserError(f"{file} holds no list of pictures, but a {type(items).__name__}")
    for number, item in enumerate(items, 1):
        place = f"{file.name}, item {number}"
        if isinstance(item, dict) and isinstance(item.get("path"), str) and item["path"]:
            yield Entry(_utf8(item["path"]), place, item)
        else:
            faults.add(place, "unreadable row", "names no picture: an object with 'path' is wanted")


def _utf8(text: str) -> str:
    """The text without lone surrogates, which JSON may hold and UTF-8 may not."""
    return text.encode("utf-8", "replace").decode()


def _names(file: pathlib.Path, faults: BadRecords) -> Iterator[Entry]:
    for place, line in tables.lines(file, faults.add):
        if name := line.strip():
            yield Entry(name, place, {})


class OfficialSource(IndexedSource):
    """The images that the lists name. Every text of an item ('prompt', 'sharegpt4v') is a kind;
    SAM's captions/NAME.txt are the kind 'caption'. A key is the path without the suffix.

    Skipped and named: a missing file, a second item of one path. The official loaders drop images
    taller than 4 times their width (4.5 in PixArt-Σ); here a filter over 'ratio' may.
    """

    def __init__(self, root: str, choice: Choice):
        self.faults = choice.faults
        self._layout = Layout.of(root)
        self.name = f"pixart:{self._layout.root.resolve().name}"
        folders = _image_folders(self._layout)
        seal, kinds = hashlib.sha256(), dict[str, None]()
        rows: dict[str, tuple[str, str]] = {}  # key → (file, JSON of [captions, other fields])
        taken: set[str] = set()
        for entry in self._layout.entries(self.faults):
            key = entry.path if self._layout.sam else posixpath.splitext(entry.path)[0]
            file = _find(folders, entry.path + (".jpg" if self._layout.sam else ""))
            if key in taken:
                self.faults.add(entry.place, "key twice", entry.path)
            elif file is None:
                self.faults.add(entry.place, "missing file", entry.path)
            else:
                captions, others = self._split(entry)
                kinds.update(dict.fromkeys(captions))
                row = _utf8(json.dumps([captions, others], ensure_ascii=False, sort_keys=True))
                rows[key] = str(file), row
                _seal(seal, key, file, f"{row}\0")
            taken.add(key)
        self._captions = self._layout.root / "captions"
        if self._layout.sam:
            for text in sorted(self._captions.rglob("*.txt")):
                kinds["caption"] = None
                _seal(seal, str(text.relative_to(self._captions)), text)
        columns = {"key": list(rows), "file": [r[0] for r in rows.values()]}
        columns["row"] = [row for _, row in rows.values()]
        schema = pa.schema({name: pa.large_string() for name in columns})
        self._table = pa.table(columns, schema)
        self.caption_kinds = tuple(kinds)
        self._choose(len(rows), ["pixart", seal.hexdigest()], choice)

    def _split(self, entry: Entry) -> tuple[dict[str, tuple[str, ...]], dict[str, Any]]:
        """(captions, numbers and flags) of an item."""
        fields = {name: value for name, value in entry.fields.items() if name != "path"}
        captions = texts.captions_of(fields, f"{entry.place}, {entry.path}", self.faults)
        return captions, {n: v for n, v in fields.items() if isinstance(v, int | float | bool)}

    def _open(self, place: int) -> BinaryIO:
        return open(self._table["file"][place].as_py(), "rb")

    def _facts(self, place: int) -> Facts:
        captions, others = json.loads(self._table["row"][place].as_py())
        label = texts.label_of(others)
        if not self._layout.sam:
            return Facts(label, others, lambda: texts.merged(captions))
        file = self._captions / f"{self._key(place)}.txt"

        def read(limit: int) -> bytes:
            with open(file, "rb") as text:
                return text.read(limit)

        # whoever wants a caption that is missing will name it
        readers = {"txt": read} if file.is_file() else {}
        place_of = f"captions/{self._key(place)}."
        return Facts(label, others, texts.side_files(readers, place_of, self.faults)[1])


def _seal(seal, name: str, file: pathlib.Path, more: str = "") -> None:
    status = file.stat()
    seal.update(_utf8(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0{more}").encode())


def _image_folders(layout: Layout) -> list[pathlib.Path]:
    """Where the images of a list may lie, in the order of the official loaders."""
    root = layout.root
    if layout.sam:
        return [root / "images"]
    swapped = pathlib.Path(str(root.resolve()).replace("InternData", "InternImgs"))
    others = [root, root / "InternImgs", root.parent / "InternImgs", root / "images"]
    return [folder for folder in dict.fromkeys([swapped, *others]) if folder.is_dir()]


def _find(folders: list[pathlib.Path], path: str) -> pathlib.Path | None:
    for number, folder in enumerate(folders):
        if (folder / path).is_file():
            folders.insert(0, folders.pop(number))  # the next one most likely lies there too
            return folder / path
    return None

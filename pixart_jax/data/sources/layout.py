"""The layout of the official PixArt repositories: where lists, pictures, captions and features lie.

ROOT/partition/data_info.json          a list of {path, height, width, ratio, prompt, …} (PixArt-Σ:
ROOT/data_info.json, and more
                                       texts, such as sharegpt4v); several .json files are one list
                                       after the other
ROOT/partition/*.txt                   SAM: the name of one picture a line, in ROOT/images/NAME.jpg,
with ROOT/captions/NAME.txt InternImgs/ beside InternData/         the pictures of a list; they may
also lie in ROOT, or in a folder of it caption_feature_wmask/ …               text states, and
img_vae_features… latents (data/features.py)
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator

from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError

_LISTS = ("partition", "partition_filter", ".")  # where official loaders look for .json


@dataclasses.dataclass(frozen=True)
class Entry:
    """path: of the picture as the list gives it, or SAM's bare name. place: file and record, for
    faults. fields: of the list's item."""

    path: str
    place: str
    fields: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Layout:
    """root: the folder. lists: the files that name the pictures. sam: whether they are SAM's
    partition files."""

    root: pathlib.Path
    lists: tuple[pathlib.Path, ...]
    sam: bool

    def entries(self, faults: BadRecords) -> Iterator[Entry]:
        """Every picture of the lists, in their order. Items that name none are left out by name."""
        for file in self.lists:
            yield from (_names if self.sam else _items)(file, faults)

    @property
    def text_kind(self) -> str:
        """The kind of the text that the features in caption_feature… are of."""
        return "caption" if self.sam else "prompt"


def layout(root: str) -> Layout:
    """What lies in ROOT. UserError where it is no such layout."""
    folder = pathlib.Path(root)
    if not folder.is_dir():
        raise UserError(f"pixart:{root}: no such folder")
    # the folder above, as the official set is unpacked
    if not any(folder.glob("partition*")) and (folder / "InternData").is_dir():
        folder = folder / "InternData"
    for place in _LISTS:
        found = (
            sorted((folder / place).glob("*.json")) if place != "." else [folder / "data_info.json"]
        )
        if found := tuple(file for file in found if file.is_file()):
            return Layout(folder, found, sam=False)
    found = tuple(sorted((folder / "partition").glob("*.txt")))
    if not found:
        raise UserError(
            f"pixart:{root}: neither partition/*.json nor data_info.json nor SAM's "
            "partition/*.txt lies there"
        )
    return Layout(folder, found, sam=True)


def _items(file: pathlib.Path, faults: BadRecords) -> Iterator[Entry]:
    try:
        items = json.loads(file.read_bytes().decode("utf-8-sig", "replace"))
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"{file} cannot be read as JSON: {fault}") from None
    if not isinstance(items, list):
        raise UserError(f"{file} holds no list of pictures, but a {type(items).__name__}")
    for number, item in enumerate(items, 1):
        place = f"{file.name}, item {number}"
        if isinstance(item, dict) and isinstance(item.get("path"), str) and item["path"]:
            yield Entry(item["path"], place, item)
        else:
            faults.add(place, "unreadable row", "names no picture: an object with 'path' is wanted")


def _names(file: pathlib.Path, faults: BadRecords) -> Iterator[Entry]:
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if name := line.strip():
                yield Entry(name, f"{file.name}, line {number}", {})

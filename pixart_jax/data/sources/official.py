"""Pictures and captions in the layout of the official PixArt repositories (sources/layout.py)."""

from __future__ import annotations

import hashlib
import json
import pathlib
import posixpath

from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import texts
from pixart_jax.data.sources.filters import LazyFields
from pixart_jax.data.sources.layout import Entry, layout
from pixart_jax.data.sources.listed import IndexedSource
from pixart_jax.data.sources.sample import Sample
from pixart_jax.data.sources.strings import StringTable


class OfficialSource(IndexedSource):
    """The pictures that the lists name. Every text of an item ('prompt', 'sharegpt4v') is a kind of
    its name; SAM's captions/NAME.txt are the kind 'caption'. A sample's key is its path without the
    suffix.

    Named and left out: an item whose file is not there, a path twice. The official loaders drop
    what is taller than 4 times its width (4.5 in PixArt-Σ); here a filter may (``where``, over
    'ratio').
    """

    def __init__(
        self,
        root: str,
        *,
        where: str | None = None,
        limit: int | None = None,
        faults: BadRecords | None = None,
    ):
        self.faults = BadRecords() if faults is None else faults
        self._layout = layout(root)
        self.name = f"pixart:{self._layout.root.resolve().name}"
        pictures = _Pictures(self._layout.root, self._layout.sam)
        self._keys, self._files, self._items = StringTable(), StringTable(), StringTable()
        seal, kinds = hashlib.sha256(), {}
        taken: set[str] = set()
        for entry in self._layout.entries(self.faults):
            key = entry.path if self._layout.sam else posixpath.splitext(entry.path)[0]
            if key in taken:
                self.faults.add(entry.place, "key twice", entry.path)
                continue
            taken.add(key)
            self._add(key, entry, pictures.find(entry.path), seal, kinds)
        if self._layout.sam:
            self._captions = self._layout.root / "captions"
            written = sorted(self._captions.rglob("*.txt")) if self._captions.is_dir() else []
            kinds = {"caption": None} if written else {}
            for entry in written:
                status = entry.stat()
                name = entry.relative_to(self._captions)
                seal.update(
                    f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "replace")
                )
        self.caption_kinds, self.num_classes = tuple(kinds), None
        self._choose(len(self._keys), ["pixart", seal.hexdigest()], where, limit)

    def _add(
        self, key: str, entry: Entry, found: pathlib.Path | None, seal, kinds: dict[str, None]
    ) -> None:
        if found is None:
            self.faults.add(entry.place, "missing file", entry.path)
            return
        status = found.stat()
        said = texts.captions_of(
            {k: v for k, v in entry.fields.items() if k != "path"},
            f"{entry.place}, {entry.path}",
            self.faults,
        )
        kinds.update(dict.fromkeys(said))
        others = {k: v for k, v in entry.fields.items() if isinstance(v, (int, float, bool))}
        item = json.dumps([said, others], ensure_ascii=False, sort_keys=True)
        seal.update(
            f"{key}\0{status.st_size}\0{status.st_mtime_ns}\0{item}\0".encode("utf-8", "replace")
        )
        self._keys.append(key)
        self._files.append(str(found))
        self._items.append(item)

    def _key(self, place: int) -> str:
        return self._keys[place]

    def _picture(self, place: int):
        return open(self._files[place], "rb")

    def _said(self, place: int) -> tuple[dict[str, tuple[str, ...]], dict[str, object]]:
        said, others = json.loads(self._items[place])
        if not self._layout.sam:
            return {kind: tuple(found) for kind, found in said.items()}, others
        file = self._captions / f"{self._keys[place]}.txt"
        place_of = f"captions/{self._keys[place]}.txt"
        try:
            if file.stat().st_size > texts.LONGEST:
                self.faults.add(
                    place_of, "caption too long", f"at most {texts.LONGEST:,} bytes are taken"
                )
                return {}, others
            text = texts.decoded(file.read_bytes(), place_of, "caption", self.faults)
        except FileNotFoundError:  # whoever wants a caption of it will name it
            text = ""
        return ({"caption": (text,)} if text else {}), others

    def _sample(self, place: int) -> Sample:
        said, others = self._said(place)
        try:
            image = pathlib.Path(self._files[place]).read_bytes()
        except OSError as fault:
            raise images.UnreadableImage(f"{self._keys[place]}: {fault}") from None
        return Sample(self._keys[place], image, said, texts.label_of(others))

    def captions_at(self, index: int) -> tuple[str, dict[str, tuple[str, ...]]]:
        """(key, captions) of a sample, for whoever counts words: the picture is not read."""
        place = self._place(index)
        return self._keys[place], self._said(place)[0]

    def _fields(self, place: int) -> LazyFields:
        said, others = self._said(place)
        captions = {kind: found[0] if len(found) == 1 else found for kind, found in said.items()}
        made = {"height": lambda: self._size(place)[0], "width": lambda: self._size(place)[1]}
        known = {name: value for name, value in others.items() if name not in made}
        return LazyFields(
            {
                **known,
                **captions,
                "captions": said,
                "key": self._keys[place],
                "label": texts.label_of(others),
            },
            made,
        )


class _Pictures:
    """Finds a list's pictures: in InternImgs beside InternData, as the official loaders do, in the
    root, or in a folder of it."""

    def __init__(self, root: pathlib.Path, sam: bool):
        self._suffix = ".jpg" if sam else ""
        swapped = pathlib.Path(str(root.resolve()).replace("InternData", "InternImgs"))
        folders = (
            [root / "images"]
            if sam
            else [swapped, root, root / "InternImgs", root.parent / "InternImgs", root / "images"]
        )
        self._folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]

    def find(self, path: str) -> pathlib.Path | None:
        for number, folder in enumerate(self._folders):
            file = folder / (path + self._suffix)
            if file.is_file():
                if number:  # the next one most likely lies there too
                    self._folders.insert(0, self._folders.pop(number))
                return file
        return None

"""Captions out of whatever holds them: a caption file, a folder of .txt, or any source; a few at a
time, bad records named."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import open_source, parse_mixture, parse_source, texts
from pixart_jax.data.sources import rows as caption_files
from pixart_jax.data.sources.folder import PICTURES
from pixart_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class CaptionRecord:
    """What is said of one picture. key: '' where its file names none; place: where it stands, for a
    person; captions: kind → texts."""

    key: str
    place: str
    captions: dict[str, tuple[str, ...]]


class CaptionTexts:
    """The captions of ``what``: .jsonl, .csv, .tsv, .parquet, a folder of .txt, or a source as
    open_source takes it.

    faults: collects what is left out. total: about how many records there are, for a progress bar.
    """

    def __init__(
        self, what: str, faults: BadRecords, split: str = "train", limit: int | None = None
    ):
        self._what, self._faults, self._limit = what, faults, limit
        path = Path(what)
        self._file = (
            path if path.suffix.lower() in caption_files.SUFFIXES and not path.is_dir() else None
        )
        self._texts = self._source = None
        if self._file is not None:
            if not path.is_file():
                raise UserError(f"{what}: no such file")
            self.name, self.total = path.stem, _records(path)
        elif path.is_dir() and parse_source(what)[0] == "folder" and not _holds(path, PICTURES):
            if not _holds(path, (".txt",)):
                raise UserError(f"{what} holds no .txt, no picture and no tar")
            self._texts, self.name, self.total = path, path.resolve().name, None
        else:
            if path.is_file() and not what.endswith(".tar"):
                raise UserError(
                    f"{what}: a caption file is one of {', '.join(caption_files.SUFFIXES)}"
                )
            self._source = open_source(what, split, limit=limit, faults=faults)
            whole = len(parse_mixture(what)) > 1 or ":" not in what
            self.name, self.total = (
                (Path(what).name if whole else self._source.name.partition(":")[2]),
                len(self._source),
            )
        if limit is not None and self.total is not None:
            self.total = min(limit, self.total)

    def __iter__(self) -> Iterator[CaptionRecord]:
        if self._file is not None:
            found = self._of_file()
        elif self._texts is not None:
            found = self._of_texts()
        else:
            found = self._of_source()
        for number, said in enumerate(found):
            if number == self._limit:
                return
            yield said

    def _of_file(self) -> Iterator[CaptionRecord]:
        for number, row in caption_files.rows(self._file, self._faults):
            place = f"{self._file.name}, row {number}"
            key = next((str(row[name]) for name in texts.FILE_FIELDS if row.get(name)), "")
            yield CaptionRecord(
                key, f"{place} ({key})" if key else place, self._cleared(row, place)
            )

    def _cleared(self, row, place: str) -> dict[str, tuple[str, ...]] | None:
        """None where a caption was left out, and is named already."""
        before = self._faults.counts["caption too long"]
        found = texts.captions_of(row, place, self._faults)
        return found if found or self._faults.counts["caption too long"] == before else None

    def _of_texts(self) -> Iterator[CaptionRecord]:
        """NAME.txt is the kind 'caption' of NAME; NAME.KIND.txt, where NAME.txt is there too, that
        kind."""
        for folder, files in itertools.groupby(
            _walk(self._texts, (".txt",)), lambda path: path.parent
        ):
            stems = {path.name[: -len(".txt")]: path for path in files}
            kinds: dict[str, dict[str, Path]] = {}
            for stem, path in stems.items():
                name, dot, kind = stem.rpartition(".")
                if dot and name in stems:
                    kinds.setdefault(name, {})[kind] = path
                else:
                    kinds.setdefault(stem, {})["caption"] = path
            for stem, paths in kinds.items():
                key = (folder.relative_to(self._texts) / stem).as_posix()
                yield CaptionRecord(key, str(folder / f"{stem}.txt"), self._read(paths))

    def _read(self, paths: dict[str, Path]) -> dict[str, tuple[str, ...]] | None:
        found, named = {}, False
        for kind, path in paths.items():
            before = len(self._faults)
            try:
                with open(path, "rb") as file:
                    text = texts.decoded(
                        file.read(texts.LONGEST + 1), str(path), kind, self._faults
                    )
            except OSError as fault:
                text = self._faults.add(str(path), "unreadable file", fault.strerror or "") or ""
            named |= len(self._faults) > before
            if text:
                found[kind] = (text,)
        return None if named and not found else found

    def _of_source(self) -> Iterator[CaptionRecord]:
        read = getattr(self._source, "captions_at", None) or self._key_and_captions
        for number in range(len(self._source)):
            try:
                key, captions = read(number)
            except UserError as fault:
                self._faults.add(
                    f"{self._source.name}, sample {number}", "unreadable record", str(fault)
                )
                continue
            place = f"{self._source.name}, {key}"
            yield CaptionRecord(
                key,
                place,
                self._cleared({kind: tuple(said) for kind, said in captions.items()}, place),
            )

    def _key_and_captions(self, number: int):
        sample = self._source[number]  # of a set that has no way to its captions alone
        return sample.key, sample.captions


def of_kinds(
    found: Iterable[CaptionRecord], kinds: Sequence[str], faults: BadRecords, what: str
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(key, place, the texts of these kinds) of each record that has any; the others are named as
    'missing caption'.

    kinds: none means 'caption', or the one kind that the first records have. UserError where that
    does not say which, or no record among the first thousand has one of them.
    """
    first: list[CaptionRecord] = []
    rest = iter(found)
    for said in rest:
        first.append(said)
        if len(first) == 1000:
            break
    known = list(dict.fromkeys(kind for said in first for kind in said.captions or ()))
    if not kinds:
        kinds = ("caption",) if "caption" in known else tuple(known)
        if len(kinds) > 1:
            raise UserError(
                f"{what} has several kinds of caption: --kind {' or --kind '.join(known)} (or "
                "several, with commas)"
            )
    elif known and not set(kinds) & set(known):
        raise UserError(
            f"{what} has no caption of kind "
            f"{' or '.join(map(repr, kinds))}{nearest(kinds[0], known)}"
        )

    def all_of_them():
        yield from first
        yield from rest

    for said in all_of_them():
        if said.captions is None:
            continue
        texts_of = tuple(text for kind in kinds for text in said.captions.get(kind, ()))
        if texts_of:
            yield said.key, said.place, texts_of
        else:
            faults.add(said.place, "missing caption")


def _records(file: Path) -> int:
    if file.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError) as fault:
            raise UserError(
                f"{file} is no whole Parquet file: {' '.join(str(fault).split())[:160]}"
            ) from None
    with open(file, "rb") as data:
        return sum(block.count(b"\n") for block in iter(lambda: data.read(1 << 22), b""))


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files of these suffixes, in an order that does not depend on the machine; hidden ones do not
    count."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield Path(here) / name


def _holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return next(_walk(folder, suffixes), None) is not None

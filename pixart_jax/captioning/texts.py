"""Captions of a caption file, a folder of .txt or any source, read as a stream; bad records are
named."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import Source, open_source, parse_mixture, parse_source, texts
from pixart_jax.data.sources import rows as caption_files
from pixart_jax.data.sources.folder import PICTURES
from pixart_jax.errors import UserError, nearest

Captions = Mapping[str, tuple[str, ...]]  # kind → texts


@dataclasses.dataclass(frozen=True)
class CaptionRecord:
    """The captions of one image. key: '' where its file has none; place: the file and the record,
    for messages; captions: None where one was skipped, and is named already."""

    key: str
    place: str
    captions: Captions | None


@dataclasses.dataclass(frozen=True)
class CaptionTexts:
    """A set of captions. total: about how many records there are, for a progress bar."""

    name: str
    total: int | None
    records: Iterator[CaptionRecord]


def open_captions(
    what: str, faults: BadRecords, split: str = "train", limit: int | None = None
) -> CaptionTexts:
    """Open a .jsonl, .csv, .tsv or .parquet, a folder of .txt, or a source as open_source takes it.
    faults: collects what is skipped."""
    path = Path(what)
    if path.suffix.lower() in caption_files.SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{what}: no such file")
        found = CaptionTexts(path.stem, _rows(path), _of_file(path, faults))
    elif path.is_dir() and parse_source(what)[0] == "folder" and not _holds(path, PICTURES):
        if not _holds(path, (".txt",)):
            raise UserError(f"{what} holds no .txt, no picture and no tar")
        found = CaptionTexts(path.resolve().name, None, _of_texts(path, faults))
    else:
        if path.is_file() and not what.endswith(".tar"):
            raise UserError(f"{what}: a caption file is one of {', '.join(caption_files.SUFFIXES)}")
        source = open_source(what, split, limit=limit, faults=faults)
        plain = len(parse_mixture(what)) > 1 or ":" not in what
        name = path.name if plain else source.name.partition(":")[2]
        found = CaptionTexts(name, len(source), _of_source(source, faults))
    if limit is None:
        return found
    total = None if found.total is None else min(limit, found.total)
    return CaptionTexts(found.name, total, itertools.islice(found.records, limit))


def _of_file(file: Path, faults: BadRecords) -> Iterator[CaptionRecord]:
    for number, row in caption_files.rows(file, faults):
        place = f"{file.name}, row {number}"
        key = next((str(row[name]) for name in texts.FILE_FIELDS if row.get(name)), "")
        shown = f"{place} ({key})" if key else place
        yield CaptionRecord(key, shown, _cleaned(row, place, faults))


def _cleaned(row: Mapping[str, object], place: str, faults: BadRecords) -> Captions | None:
    before = faults.counts["caption too long"]
    found = texts.captions_of(row, place, faults)
    return found if found or faults.counts["caption too long"] == before else None


def _of_texts(root: Path, faults: BadRecords) -> Iterator[CaptionRecord]:
    """NAME.txt is the kind 'caption' of NAME; NAME.KIND.txt, where NAME.txt exists, is that
    kind."""
    for folder, files in itertools.groupby(_walk(root, (".txt",)), lambda path: path.parent):
        stems = {path.name.removesuffix(".txt"): path for path in files}
        kinds: dict[str, dict[str, Path]] = {}
        for stem, path in stems.items():
            name, _, kind = stem.rpartition(".")
            name, kind = (name, kind) if name in stems else (stem, "caption")
            kinds.setdefault(name, {})[kind] = path
        for stem, paths in kinds.items():
            key = (folder.relative_to(root) / stem).as_posix()
            yield CaptionRecord(key, str(folder / f"{stem}.txt"), _read(paths, faults))


def _read(paths: Mapping[str, Path], faults: BadRecords) -> Captions | None:
    found, before = {}, len(faults)
    for kind, path in paths.items():
        try:
            with open(path, "rb") as file:
                data = file.read(texts.LONGEST + 1)
        except OSError as error:
            faults.add(str(path), "unreadable file", error.strerror or "")
            continue
        if text := texts.decoded(data, str(path), kind, faults):
            found[kind] = (text,)
    return None if len(faults) > before and not found else found


def _of_source(source: Source, faults: BadRecords) -> Iterator[CaptionRecord]:
    # tfds sets and records have no way to a sample's captions alone
    read = getattr(source, "captions_at", None)
    for number in range(len(source)):
        try:
            if read is not None:
                key, captions = read(number)
            else:
                sample = source[number]
                key, captions = sample.key, sample.captions
        except UserError as error:
            place = f"{source.name}, sample {number}"
            faults.add(place, "unreadable record", str(error))
            continue
        place = f"{source.name}, {key}"
        row = {kind: tuple(found) for kind, found in captions.items()}
        yield CaptionRecord(key, place, _cleaned(row, place, faults))


def of_kinds(
    records: Iterator[CaptionRecord], kinds: Sequence[str], faults: BadRecords, what: str
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (key, place, the texts of these kinds) of each record that has any; the others are
    named as 'missing caption'.

    kinds: none means 'caption', or the one kind that the first records have. Raises UserError where
    that is ambiguous, or where no record among the first thousand has one of them.
    """
    first = list(itertools.islice(records, 1000))
    known = list(dict.fromkeys(kind for record in first for kind in record.captions or ()))
    if not kinds:
        kinds = ("caption",) if "caption" in known else tuple(known)
        if len(kinds) > 1:
            raise UserError(
                f"{what} has several kinds of caption: --kind {' or --kind '.join(known)} (or "
                "several, with commas)"
            )
    elif known and not set(kinds) & set(known):
        wanted = " or ".join(map(repr, kinds))
        raise UserError(f"{what} has no caption of kind {wanted}{nearest(kinds[0], known)}")
    for record in itertools.chain(first, records):
        if record.captions is None:
            continue
        found = tuple(text for kind in kinds for text in record.captions.get(kind, ()))
        if found:
            yield record.key, record.place, found
        else:
            faults.add(record.place, "missing caption")


def _rows(file: Path) -> int:
    if file.suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{file} is no whole Parquet file: {reason}") from None
    with open(file, "rb") as data:
        return sum(block.count(b"\n") for block in iter(lambda: data.read(1 << 22), b""))


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """Files of these suffixes, hidden ones excluded, in an order that does not depend on the
    machine."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(suffixes):
                yield Path(here) / name


def _holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return next(_walk(folder, suffixes), None) is not None

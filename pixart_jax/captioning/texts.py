"""The captions of a caption file, a folder of .txt or any source, as a stream."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pixart_jax import tables
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.images import PICTURES
from pixart_jax.data.sources import Mixture, open_source, parse_source, texts
from pixart_jax.data.sources.indexed import IndexedSource
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import hash64

Captions = Mapping[str, tuple[str, ...]]  # kind → texts
# of an image: key ('' where its file has none), place (for messages), and captions, None where one
# was skipped and is named already
Record = tuple[str, str, Captions | None]


def open_captions(
    what: str, faults: BadRecords, split: str = "train", limit: int | None = None
) -> tuple[str, int | None, Iterator[Record]]:
    """Return (name, number of records where it is known, records) of a .jsonl, .csv, .tsv or
    .parquet, a folder of .txt, or a source. faults: collects what is skipped."""
    path = Path(what)
    if path.suffix.lower() in tables.SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{what}: no such file")
        return path.stem, None, itertools.islice(_of_file(path, faults), limit)
    if path.is_file() and path.suffix != ".tar":
        raise UserError(f"{what}: a caption file is one of {', '.join(tables.SUFFIXES)}")
    if path.is_dir() and parse_source(what)[0] == "folder":
        suffixes = {file.suffix.lower().removeprefix(".") for file in path.rglob("*")}
        if not suffixes & {*texts.TEXTS, *PICTURES}:
            raise UserError(f"{what} holds no .txt, no picture and no tar")
        if not suffixes & PICTURES:
            return path.resolve().name, None, itertools.islice(_of_texts(path, faults), limit)
    source = open_source(what, split, limit=limit, faults=faults)
    name = re.sub(r"(^|\*)[a-z-]+:", r"\1", source.name)
    return name, len(source), _of_source(source, faults)


def _of_file(file: Path, faults: BadRecords) -> Iterator[Record]:
    for place, row in tables.rows(file, faults.add):
        key = texts.image_named(row) or ""
        found = texts.captions_of(row, place, faults)
        yield key, f"{place} ({key})" if key else place, found


def _of_texts(root: Path, faults: BadRecords) -> Iterator[Record]:
    """NAME.txt is the kind 'caption' of NAME; NAME.KIND.txt, beside NAME.txt, is that kind."""
    stems = {}
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if texts.kind_of(path.suffix[1:]) and not any(p.startswith(".") for p in inside.parts):
            stems[inside.with_suffix("").as_posix()] = path
    kinds: dict[str, dict[str, Path]] = {}
    for stem, path in stems.items():
        name, suffix = posixpath.splitext(stem)
        name, kind = (name, suffix[1:]) if suffix and name in stems else (stem, "caption")
        kinds.setdefault(name, {})[kind] = path
    for key, paths in kinds.items():
        captions, before = {}, len(faults)
        for kind, path in paths.items():
            try:
                text = texts.decoded(path.read_bytes(), str(path), kind, faults)
            except OSError as error:
                faults.add(str(path), "unreadable file", error.strerror or "")
                continue
            if text:
                captions[kind] = (text,)
        yield (
            key,
            str(next(iter(paths.values()))),
            captions if captions or len(faults) == before else None,
        )


def _of_source(source: IndexedSource | Mixture, faults: BadRecords) -> Iterator[Record]:
    for number in range(len(source)):
        try:
            key, captions = source.captions_at(number)
        except UserError as error:
            faults.add(f"{source.name}, sample {number}", "unreadable record", str(error))
            continue
        place = f"{source.name}, {key}"
        yield key, place, texts.captions_of(captions, place, faults)


def texts_of_kinds(
    records: Iterator[Record], kinds: Sequence[str], faults: BadRecords, what: str
) -> Iterator[tuple[str, ...]]:
    """Yield the texts of these kinds of each record; name a record without any, or with the key of
    an earlier one, in ``faults``.

    kinds: none means 'caption', or the one kind that the first thousand records have. Raises
    UserError where that is ambiguous, or where none of those has one of the kinds.
    """
    first = list(itertools.islice(records, 1000))
    known = list(dict.fromkeys(kind for _, _, captions in first for kind in captions or ()))
    if not kinds:
        kinds = ("caption",) if "caption" in known else tuple(known)
        if len(kinds) > 1:
            raise UserError(
                f"{what} has several kinds of caption: --kind {' or --kind '.join(known)}"
            )
    elif known and not set(kinds) & set(known):
        wanted = " or ".join(map(repr, kinds))
        raise UserError(f"{what} has no caption of kind {wanted}{nearest(kinds[0], known)}")
    seen: set[int] = set()
    for key, place, captions in itertools.chain(first, records):
        if captions is None:
            continue
        found = tuple(text for kind in kinds for text in captions.get(kind, ()))
        if not found:
            faults.add(place, "missing caption")
        elif key and hash64(key) in seen:
            faults.add(place, "key twice", key)
        else:
            seen.add(hash64(key))
            yield found

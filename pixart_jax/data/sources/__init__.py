"""Sources of samples. :func:`open_source` opens any of them by its text (docs/data_sources.md)."""

from __future__ import annotations

import math
import os
import re

from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.images import PICTURES
from pixart_jax.data.sources.encoded import RecordsSource
from pixart_jax.data.sources.folder import FolderSource
from pixart_jax.data.sources.indexed import Choice, IndexedSource
from pixart_jax.data.sources.mixture import Mixture, parse_mixture
from pixart_jax.data.sources.official import OfficialSource
from pixart_jax.data.sources.parquet import ParquetSource, files_with_images
from pixart_jax.data.sources.sample import Sample, Source
from pixart_jax.data.sources.tfds import TfdsSource
from pixart_jax.data.sources.webdataset import WebdatasetSource
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import is_remote
from pixart_jax.remote_path import located

__all__ = ["Mixture", "Sample", "Source", "open_source", "parse_mixture", "parse_source"]

_KINDS = "tfds folder webdataset parquet pixart pixart-features records states".split()
_FORMS = (
    "tfds:NAME[/CONFIG], folder:DIR[?captions=FILE], webdataset:TARS, parquet:FILES, pixart:ROOT, "
    "records:DIR, states:FILE, a folder, a .tar or a .parquet by its path, or a mixture as "
    "'0.7*folder:a + 0.3*folder:b'"
)


def parse_source(source: str) -> tuple[str, str]:
    """(kind, the rest) of a text that names one set.

    The kind of a bare path follows from its contents: a manifest (records), tars (webdataset),
    partition lists (pixart), Parquet files with embedded images and no other image (parquet), else
    a folder. Raises UserError for anything else.
    """
    kind, colon, rest = source.partition(":")
    if colon and kind in _KINDS and rest:
        if kind in ("pixart", "pixart-features") and is_remote(rest):
            raise UserError(f"{source}: this layout is read from a disk: copy it to one")
        return kind, rest
    path = located(source)
    if path.is_dir():

        def holds(*patterns: str) -> bool:
            return any(any(path.glob(pattern)) for pattern in patterns)

        if holds(records.MANIFEST, "progress/identity.json", "*.array_record"):
            return "records", source
        if holds("*.tar"):
            return "webdataset", source
        if holds("partition*/*", "data_info.json", "InternData/"):
            return "pixart", source
        with_images = holds("*.parquet", "*/*.parquet") and files_with_images(path)
        if with_images and not any(f.suffix.lower()[1:] in PICTURES for f in path.rglob("*")):
            return "parquet", source
        return "folder", source
    if source.endswith(".parquet") and path.is_file():
        return "parquet", source
    if source.endswith(".tar") and (path.is_file() or re.search(r"[{*?\[]", source)):
        return "webdataset", source
    reason = "no such folder or tar"
    if is_remote(source):
        reason = "nothing lies there"
    elif colon and kind not in _KINDS and "/" not in kind and os.sep not in kind:
        reason = f"no kind is called {kind!r}{nearest(kind, _KINDS)}"
    raise UserError(f"unknown source {source!r}: {reason}; what can be opened: {_FORMS}")


def open_source(
    source: str,
    split: str = "train",
    *,
    where: str | None = None,
    limit: int | None = None,
    data_dir: str | os.PathLike | None = None,
    strict: bool = False,
    faults: BadRecords | None = None,
) -> IndexedSource | Mixture:
    """Open a set by its text.

    split: of a tfds set. where: a filter, by name or as 'package.module:function' over a record's
    fields. limit: the first so many samples that pass, of a mixture each part's share of them.
    data_dir: where tfds sets lie. faults: collects the skipped records. strict: raise the first of
    them. Raises UserError for an unknown set, split or filter.
    """
    faults = BadRecords(strict) if faults is None else faults
    parts = parse_mixture(source)
    if len(parts) == 1:
        return _open(parts[0][1], Choice(where, limit, faults), split, data_dir)
    limits = [limit and math.ceil(share * limit) for share, _ in parts]
    opened = [
        _open(text, Choice(where, most, faults), split, data_dir)
        for (_, text), most in zip(parts, limits, strict=True)
    ]
    return Mixture(opened, [share for share, _ in parts], faults)


def _open(
    source: str, choice: Choice, split: str, data_dir: str | os.PathLike | None
) -> IndexedSource:
    kind, rest = parse_source(source)
    if kind == "tfds":
        return TfdsSource(rest, choice, split, data_dir)
    if split not in ("train", "all"):
        raise UserError(f"{source} has no split {split!r}: only tfds sets have splits")
    if kind == "folder":
        folder, mark, options = rest.partition("?captions=")
        if not mark and "?" in rest and not located(rest).exists():
            raise UserError(f"folder:{rest}: the one option is ?captions=FILE, or FILE,FILE")
        tables = [file for file in options.split(",") if file]
        return FolderSource(folder, choice, tables)
    if kind == "webdataset":
        return WebdatasetSource(rest, choice)
    if kind == "parquet":
        return ParquetSource(rest, choice)
    if kind == "pixart":
        return OfficialSource(rest, choice)
    if kind == "records":
        return RecordsSource(rest, choice)
    if kind == "states":
        raise UserError(f"{source} holds texts alone: task tdm trains on them (data.source)")
    pictures = f"pixart:{rest.partition('?')[0]}"
    raise UserError(
        f"{source} holds features, which only training reads; its pictures are {pictures}"
    )

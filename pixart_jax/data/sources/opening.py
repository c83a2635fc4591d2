"""Any set by its text."""

from __future__ import annotations

import math
import os
import pathlib
import re

from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources.encoded import RecordsSource
from pixart_jax.data.sources.folder import FolderSource
from pixart_jax.data.sources.mixture import Mixture, parse_mixture
from pixart_jax.data.sources.official import OfficialSource
from pixart_jax.data.sources.sample import Source
from pixart_jax.data.sources.tfds import TfdsSource
from pixart_jax.data.sources.webdataset import WebdatasetSource
from pixart_jax.errors import UserError, nearest

KINDS = ("tfds", "folder", "webdataset", "pixart", "pixart-features", "records")
_FORMS = (
    "tfds:NAME[/CONFIG], folder:DIR[?captions=FILE], webdataset:TARS, pixart:ROOT, records:DIR, a "
    "folder or a .tar by its path, "
    "or a mixture as '0.7*folder:a + 0.3*folder:b'"
)


def parse_source(source: str) -> tuple[str, str]:
    """(kind, the rest) of a text that names one set: a kind of KINDS. A path alone is told by what
    lies there: a manifest (records), tars (webdataset), partition lists (pixart), else a folder of
    pictures. UserError where it is none of these.
    """
    kind, colon, rest = source.partition(":")
    if colon and kind in KINDS and rest:
        return kind, rest
    path = pathlib.Path(source)
    if path.is_dir():
        if (
            (path / records.MANIFEST).exists()
            or (path / "progress" / "identity.json").exists()
            or any(path.glob("*.array_record"))
        ):
            return "records", source
        if any(path.glob("*.tar")):
            return "webdataset", source
        if (
            any(path.glob("partition*/*"))
            or (path / "data_info.json").is_file()
            or (path / "InternData").is_dir()
        ):
            return "pixart", source
        return "folder", source
    if source.endswith(".tar") and (path.is_file() or re.search(r"[{*?\[]", source)):
        return "webdataset", source
    if colon and "/" not in kind and kind not in KINDS and os.sep not in kind:
        raise UserError(
            f"unknown source {source!r}: no kind is called {kind!r}{nearest(kind, KINDS)}; what "
            f"can be opened: {_FORMS}"
        )
    raise UserError(
        f"unknown source {source!r}: no such folder or tar; what can be opened: {_FORMS}"
    )


def open_source(
    source: str,
    split: str = "train",
    *,
    where: str | None = None,
    limit: int | None = None,
    data_dir: str | os.PathLike | None = None,
    strict: bool = False,
    faults: BadRecords | None = None,
) -> Source:
    """A set by its text; docs/data_sources.md has the forms.

    split: of a tfds set; other sets are one split. where: a filter by name ('single', 'labelled')
    or 'package.module:function' over a record's fields. limit: the first so many samples that pass,
    of a mixture each part's share of them. data_dir: where tfds sets lie.
    faults: collects what is left out (a fresh one by default, the source's ``faults``); strict: the
    first such record is a UserError instead, as with ``faults=Faults(strict=True)``. Raises
    UserError for an unknown set, split or filter.
    """
    faults = BadRecords(strict) if faults is None else faults
    parts = parse_mixture(source)
    if len(parts) > 1:
        shares = [None if limit is None else math.ceil(share * limit) for share, _ in parts]
        opened = [
            _open(text, split, where, most, data_dir, faults)
            for (_, text), most in zip(parts, shares, strict=True)
        ]
        return Mixture(opened, [share for share, _ in parts], faults)
    return _open(parts[0][1], split, where, limit, data_dir, faults)


def _open(
    source: str, split: str, where: str | None, limit: int | None, data_dir, faults: BadRecords
) -> Source:
    kind, rest = parse_source(source)
    if kind == "tfds":
        return TfdsSource(rest, split, where=where, limit=limit, data_dir=data_dir, faults=faults)
    if split not in ("train", "all"):
        raise UserError(
            f"{source} has no split {split!r}: only tfds sets have splits; name the folder or the "
            "tars of the split instead"
        )
    chosen = {"where": where, "limit": limit, "faults": faults}
    if kind == "folder":
        folder, tables = _tables(rest)
        return FolderSource(folder, tables=tables, **chosen)
    if kind == "webdataset":
        return WebdatasetSource(rest, **chosen)
    if kind == "pixart":
        return OfficialSource(rest, **chosen)
    if kind == "records":
        return RecordsSource(rest, **chosen)
    pictures = f"pixart:{rest.partition('?')[0]}"
    raise UserError(
        f"{source} holds features, no pictures: only training reads them (data.source); its "
        f"pictures are {pictures}"
    )


def _tables(text: str) -> tuple[str, list[str]]:
    """'DIR?captions=A,B' → (DIR, [A, B])."""
    folder, mark, options = text.partition("?captions=")
    if not mark and "?" in text and not pathlib.Path(text).exists():
        raise UserError(f"folder:{text}: the one option is ?captions=FILE, or FILE,FILE")
    return folder, [file for file in options.split(",") if file]

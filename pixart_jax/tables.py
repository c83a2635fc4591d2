"""Tables that people bring: CSV, JSON lines, JSON and Parquet files as rows of named values.

One reader for prompt files and caption tables. A byte order mark names the encoding, anything else
is UTF-8; a line ends at \\n, \\r\\n or \\r and nowhere else; the header of a CSV file shows its
separator. What cannot be read goes to ``report``, and reading goes on.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pixart_jax.errors import UserError, one_line
from pixart_jax.remote_path import Location, RemotePath, local

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")

Report = Callable[[str, str, str, bool], None]
"""(place, kind, detail, repaired) of a row that was skipped, or repaired."""
Rows = Iterator[tuple[str, dict[str, Any]]]
"""(place, column → value): the place is the file's name with the line or, of Parquet, the row."""

BAD_ROW = "unreadable row"
NOT_UTF8 = "not UTF-8"
_MAX_FIELD = 2**26  # characters of a CSV field
_MAX_LINES = 1_000  # of a quoted CSV field
_SEPARATORS = ",;\t|"
_MARKS = (  # UTF-32's first: UTF-16's is its beginning
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ESCAPED = re.compile("[\udc80-\udcff]+")


def encoding_of(start: bytes) -> str:
    """The encoding that the first bytes of a file name; UTF-8 without a byte order mark."""
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")


def decode(data: bytes) -> tuple[str, bool]:
    """(text, whether invalid bytes were replaced by U+FFFD) of a small file."""
    encoding = encoding_of(data[:4])
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        return data.decode(encoding, "replace"), True


def rows(path: str | os.PathLike, report: Report) -> Rows:
    """Yield the rows of a table. Raises UserError for a file of another kind, for one that cannot
    be opened, and for a .json that is neither a list of objects, nor COCO's captions, nor an object
    of objects."""
    path = local(path)
    readers = {".csv": _csv, ".tsv": _csv, ".json": _json, ".parquet": _parquet}
    readers |= {".jsonl": _jsonl, ".ndjson": _jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: a table is one of {', '.join(SUFFIXES)}")
    try:
        yield from reader(path, report)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def lines(path: Path, report: Report) -> Iterator[tuple[str, str]]:
    """Yield (place, line without its end). Invalid UTF-8 becomes U+FFFD and is reported."""
    with open(path, "rb") as start:
        encoding = encoding_of(start.read(4))
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    with open(path, encoding=encoding, errors=errors) as text:
        for number, line in enumerate(text, 1):
            place = f"{path.name}, line {number}"
            if _ESCAPED.search(line) or (errors == "replace" and "\ufffd" in line):
                report(place, NOT_UTF8, "bytes became U+FFFD", True)
                line = _ESCAPED.sub("\ufffd", line)
            yield place, line.rstrip("\n")


def _jsonl(path: Path, report: Report) -> Rows:
    for place, line in lines(path, report):
        if line.strip():
            yield from _objects([(place, line)], report)


def _objects(texts: Iterable[tuple[str, str]], report: Report) -> Rows:
    for place, text in texts:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            report(place, BAD_ROW, f"not valid JSON: {one_line(error)}", False)
            continue
        if isinstance(row, dict | str):
            yield place, row if isinstance(row, dict) else {"prompt": row}
        else:
            report(place, BAD_ROW, f"a JSON object is wanted, not {type(row).__name__}", False)


def _csv(path: Path, report: Report) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD))
    source = _PushBack(line for line in lines(path, report) if line[1].strip())
    header: list[str] = []
    separator = "\t" if path.suffix.lower() == ".tsv" else ""
    for place, text in source:
        separator = separator or max(_SEPARATORS, key=text.count)
        fields, wrong = _fields(text, separator), ""
        more: list[tuple[str, str]] = []
        while fields is None and len(more) < _MAX_LINES and (line := next(source, None)):
            more.append(line)  # of a quoted field
            text += f"\n{line[1]}"
            fields = _fields(text, separator)
        if not fields:
            wrong = "an unclosed quote" if fields is None else "text beside a quoted field"
        elif not header:
            header = [name.strip() for name in fields]
            continue
        elif len(fields) != len(header):
            wrong = f"{len(fields)} fields under {len(header)} columns"
        if wrong:
            report(place, BAD_ROW, wrong, False)
            source.push(more)  # one bad quote costs one line
        else:
            yield place, dict(zip(header, fields or ()))


class _PushBack:
    """An iterator that takes items back."""

    def __init__(self, items: Iterable[tuple[str, str]]):
        self._items = iter(items)

    def __iter__(self) -> _PushBack:
        return self

    def __next__(self) -> tuple[str, str]:
        return next(self._items)

    def push(self, items: Iterable[tuple[str, str]]) -> None:
        self._items = itertools.chain(list(items), self._items)


def _fields(text: str, separator: str) -> list[str] | None:
    """The fields of a CSV record; None where a quote is open at its end, [] for one that cannot be
    read."""
    reader = csv.reader([text], delimiter=separator, skipinitialspace=True, strict=True)
    try:
        return next(reader)
    except csv.Error as error:
        return None if "end of data" in str(error) else []


def _json(path: Path, report: Report) -> Rows:
    """A list of objects; COCO's {"images": [{"id", "file_name"}], "annotations": [{"image_id",
    "caption"}]}; or {image: {"caption": …}}, as kohya's scripts write it."""
    text, replaced = decode(path.read_bytes())
    if replaced:
        report(path.name, NOT_UTF8, "bytes became U+FFFD", True)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from None
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        images = {i.get("id"): i for i in value.get("images", ()) if isinstance(i, dict)}
        value = [
            {**images.get(one.get("image_id"), {}), "caption": one.get("caption")}
            for one in value["annotations"]
            if isinstance(one, dict)
        ]
    elif isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
        value = [{"file_name": name, **fields} for name, fields in value.items()]
    if not isinstance(value, list):
        raise UserError(
            f"{path}: a list of objects is wanted, COCO's captions or an object of them"
        )
    for number, row in enumerate(value, 1):
        if isinstance(row, dict):
            yield f"{path.name}, entry {number}", row
        else:
            found = f"a JSON object is wanted, not {type(row).__name__}"
            report(f"{path.name}, entry {number}", BAD_ROW, found, False)


def _parquet(path: Path, report: Report) -> Rows:
    """Columns of bytes, such as embedded images, are left out; an image's path stays."""
    import pyarrow

    with open_parquet(path) as table:
        columns = [
            column.path
            for column in (table.schema.column(n) for n in range(len(table.schema)))
            if column.physical_type != "BYTE_ARRAY" or column.logical_type.type != "NONE"
        ]
        end = 0
        for group in range(table.num_row_groups):
            number, end = end, end + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(1024, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path.name}, row {number}", row
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                detail = f"{end - number} rows of a damaged group: {one_line(error)}"
                report(f"{path.name}, rows {number + 1} to {end}", BAD_ROW, detail, False)


def open_parquet(path: Location):
    """A pyarrow ParquetFile, of a bucket's file read by ranges. Raises UserError for a damaged
    one."""
    import pyarrow
    import pyarrow.parquet

    try:
        remote = isinstance(path, RemotePath)
        return pyarrow.parquet.ParquetFile(path.open("rb") if remote else path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a complete Parquet file: {one_line(error)}") from None

"""The rows of a caption file: jsonl, csv, tsv or Parquet, one row an image."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError, one_line

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_BAD = "unreadable row"
_LONGEST_FIELD = 2**26  # bytes of a csv field
Rows = Iterator[tuple[int, dict[str, Any]]]


def rows(file: pathlib.Path, faults: BadRecords) -> Rows:
    """Yield (number from 1, column → value). Unreadable rows are skipped and named in ``faults``:
    pyarrow's JSON and CSV readers would refuse the whole file. Raises UserError for a file of
    another kind, or one that cannot be opened."""
    readers = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if file.suffix.lower() not in readers:
        raise UserError(f"{file}: a caption file is one of {', '.join(SUFFIXES)}")
    try:
        yield from readers[file.suffix.lower()](file, faults)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def _jsonl(file: pathlib.Path, faults: BadRecords) -> Rows:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{file.name}, row {number}"
            try:
                row = json.loads(line.decode("utf-8-sig", "replace"))
            except (ValueError, RecursionError) as error:
                cut = "the file ends in it" if not line.endswith(b"\n") else str(error)
                faults.add(place, _BAD, cut)
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                faults.add(place, _BAD, f"a JSON object is wanted, not {type(row).__name__}")


def _csv(file: pathlib.Path, faults: BadRecords) -> Rows:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    mark = "\t" if file.suffix.lower() == ".tsv" else ","
    header: list[str] = []
    number = 0
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as text:
        reader = csv.reader(text, delimiter=mark, strict=True)
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:
                number += 1
                faults.add(f"{file.name}, row {number}", _BAD, str(error))
                continue
            if row is None:
                return
            if not row:
                continue
            if not header:
                header = [name.strip() for name in row]
                continue
            number += 1
            if len(row) == len(header):
                yield number, dict(zip(header, row))
            else:
                detail = f"{len(row)} fields under {len(header)} columns"
                faults.add(f"{file.name}, row {number}", _BAD, detail)


def _parquet(file: pathlib.Path, faults: BadRecords) -> Rows:
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is no whole Parquet file: {one_line(error)}") from None
    with table:
        end = 0
        for group in range(table.num_row_groups):
            number, end = end, end + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(1024, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                detail = f"{end - number} rows of a damaged group: {error}"
                faults.add(f"{file.name}, rows {number + 1} to {end}", _BAD, detail)

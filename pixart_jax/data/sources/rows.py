"""The rows of a caption file: jsonl, csv or Parquet, one row a picture, read once from end to
end."""

from __future__ import annotations

import csv
import json
import pathlib
from collections.abc import Iterator

from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
# bytes: a row beyond is skipped to its end, so that no file of one line fills the memory
_LONGEST_ROW = 2**26


def rows(file: pathlib.Path, faults: BadRecords) -> Iterator[tuple[int, dict[str, object]]]:
    """(number of the row, column → value); rows that cannot be read are named in ``faults``. Rows
    count from 1, of a csv without its header. UserError where the file is none of the three kinds,
    or cannot be opened."""
    readers = {".jsonl": _jsonl, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if file.suffix.lower() not in readers:
        raise UserError(f"{file}: a caption file is one of {', '.join(SUFFIXES)}")
    try:
        yield from readers[file.suffix.lower()](file, faults)
    except OSError as fault:
        raise UserError(f"{file} cannot be read: {fault.strerror or fault}") from None


def _jsonl(file: pathlib.Path, faults: BadRecords) -> Iterator[tuple[int, dict[str, object]]]:
    with open(file, "rb") as lines:
        number = 0
        while line := lines.readline(_LONGEST_ROW):
            number += 1
            if len(line) == _LONGEST_ROW and not line.endswith(b"\n"):
                while (rest := lines.readline(_LONGEST_ROW)) and not rest.endswith(b"\n"):
                    pass
                faults.add(
                    f"{file.name}, row {number}",
                    "unreadable row",
                    f"longer than {_LONGEST_ROW:,} bytes",
                )
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", "replace"))
            except (ValueError, RecursionError) as fault:
                cut = "the file ends in it" if not line.endswith(b"\n") else str(fault)
                faults.add(f"{file.name}, row {number}", "unreadable row", cut)
                continue
            if isinstance(row, dict):
                yield number, row
            else:
                faults.add(
                    f"{file.name}, row {number}",
                    "unreadable row",
                    f"a JSON object is wanted, not {type(row).__name__}",
                )


def _csv(file: pathlib.Path, faults: BadRecords) -> Iterator[tuple[int, dict[str, object]]]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_ROW))
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as text:
        reader = csv.reader(
            text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True
        )
        header: list[str] | None = None
        number = 0
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as fault:
                number += 1
                faults.add(f"{file.name}, row {number}", "unreadable row", str(fault))
                continue
            if not row:
                continue
            if header is None:
                header = [name.strip() for name in row]
                continue
            number += 1
            if len(row) != len(header):
                faults.add(
                    f"{file.name}, row {number}",
                    "unreadable row",
                    f"{len(row)} fields under {len(header)} columns",
                )
                continue
            yield number, dict(zip(header, row, strict=True))


def _parquet(file: pathlib.Path, faults: BadRecords) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as fault:
        raise UserError(
            f"{file} is no whole Parquet file: {' '.join(str(fault).split())[:160]}"
        ) from None
    with table:
        number = 0
        for group in range(table.num_row_groups):
            first = number
            try:
                for batch in table.iter_batches(1024, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as fault:
                size = table.metadata.row_group(group).num_rows
                left = first + size - number
                detail = f"{left} rows of a damaged group: {' '.join(str(fault).split())[:120]}"
                faults.add(
                    f"{file.name}, rows {number + 1} to {first + size}", "unreadable row", detail
                )
                number = first + size

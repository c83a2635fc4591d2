"""The files of a captioning run: an append-only log while it runs, the captions in the source's
order when it ends.

    NAME.jsonl            the captions, one JSON object per line; written at the end, atomically
    NAME.manifest.json    what they were made with and how many: marks the file as finished
    NAME.jsonl.partial    the log of an unfinished run: its identity, then one row per sample
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.errors import Notice, UserError
from pixart_jax.files import atomic_write, locked, write_json

Row = dict[str, Any]


@contextlib.contextmanager
def open_log(file: Path, identity: Mapping[str, str], source) -> Iterator[CaptionLog]:
    """Hold the log of a caption file, for one process at a time.

    identity: what every caption is made with; another one raises UserError. Where the source has
    changed since the file was begun, captions keep their images by key.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    busy = UserError(f"{file}: another run is writing it")
    with locked(file.with_name(f".{file.name}.lock"), busy=busy):
        yield CaptionLog(file, identity, source)


class CaptionLog:
    """The rows of a run; see :func:`open_log`. manifest: the facts of a finished file, which holds
    all of this source; None before."""

    def __init__(self, file: Path, identity: Mapping[str, str], source):
        self.file, self._source = file, source
        self._header = {"identity": dict(identity), "fingerprint": source.fingerprint}
        self.partial = file.with_name(f"{file.name}.partial")
        self._manifest_file = file.with_name(f"{file.stem}.manifest.json")
        self._places = np.full(len(source), -1, np.int64)  # in the log, of each sample's row
        self.manifest: Row | None = None
        header, earlier = self._read(), self.partial
        if header is None and file.exists():
            if not self._manifest_file.exists():
                raise UserError(f"{file} was not written by this command: give another --out")
            try:
                header = json.loads(self._manifest_file.read_text(encoding="utf-8"))
                header["identity"], header["fingerprint"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self._manifest_file} is damaged: remove it and {file}, or give another --out"
                ) from None
            earlier = file
            self._compare(header["identity"], file)
            if header["fingerprint"] == source.fingerprint:
                self.manifest = header
                return
        if header is None or header["fingerprint"] != source.fingerprint:
            self._begin(read_lines(earlier) if header else None)
            self._read()

    @property
    def done(self) -> np.ndarray:
        """bool [n]: which samples have a row."""
        return self._places >= 0

    def _compare(self, found: Mapping[str, str], where: Path) -> None:
        differences = [
            f"{name} {found.get(name)!r}, now {value!r}"
            for name, value in self._header["identity"].items()
            if found.get(name) != value
        ]
        if differences:
            raise UserError(
                f"{where} was written with another {', '.join(differences)}: give another --out"
            )

    def _read(self) -> Row | None:
        """Return the log's header, None where there is none; note the places of its rows, and drop
        a last line that a kill left incomplete."""
        if not self.partial.exists():
            return None
        header, place = None, 0
        self._places[:] = -1
        with open(self.partial, "rb+") as log:
            for number, line in enumerate(log, 1):
                if not line.endswith(b"\n"):
                    log.truncate(place)
                    break
                try:
                    row = json.loads(line)
                    if number == 1:
                        header = {name: row[name] for name in self._header}
                    elif row["index"] < len(self._places):
                        self._places[row["index"]] = place
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.partial}, line {number}, is damaged: remove the line to have its "
                        "picture captioned again (of line 1, remove the file)"
                    ) from None
                place += len(line)
        if header is not None:
            self._compare(header["identity"], self.partial)
        return header

    def _begin(self, earlier: Iterable[Row] | None) -> None:
        """Write a new log, with captions of an earlier state of the source renumbered."""
        numbers: dict[str, int] = {}  # of keys; the first where one occurs twice
        for number in range(len(self._source) if earlier else 0):
            with contextlib.suppress(UserError):  # a record that cannot be read has no caption
                numbers.setdefault(self._source.captions_at(number)[0], number)
        kept = lost = 0
        with atomic_write(self.partial) as out:
            out.write(_line(self._header))
            for row in earlier or ():
                if "caption" in row and "left_out" not in row:
                    number = numbers.pop(row["key"], -1)
                    kept, lost = kept + (number >= 0), lost + (number < 0)
                    if number >= 0:
                        out.write(_line({**row, "index": number}))
        if earlier:
            gone = f", {lost} captions belong to pictures that are gone" if lost else ""
            changed = f"the source has changed since {self.file} was begun"
            warnings.warn(f"{changed}: {kept} captions are kept{gone}", Notice, stacklevel=2)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows; when this returns they are on the disk. A sample gets one row."""
        with open(self.partial, "ab") as log:
            for row in rows:
                if self._places[row["index"]] < 0:
                    self._places[row["index"]] = log.tell()
                    log.write(_line(row))
            log.flush()
            os.fsync(log.fileno())

    def rows(self) -> Iterator[Row]:
        """Every row, in the order of the source."""
        with open(self.partial, "rb") as log:
            for place in self._places[self.done]:
                log.seek(place)
                yield json.loads(log.readline())

    def finalize(self, public: Callable[[Row], Row], facts: Row) -> Row:
        """Write the caption file and its manifest, then remove the log; return the manifest. Killed
        in between, the next run does it again."""
        with atomic_write(self.file) as out:
            out.writelines(_line(public(row)) for row in self.rows() if "left_out" not in row)
        self.manifest = {**self._header, **facts}
        write_json(self._manifest_file, self.manifest, indent=1, ensure_ascii=False)
        self.partial.unlink()
        return self.manifest


def read_lines(file: Path) -> Iterator[Row]:
    """The rows of a .jsonl file that this module wrote."""
    with open(file, "rb") as lines:
        yield from map(json.loads, lines)


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=True).encode() + b"\n"

"""The files of a captioning run: an append-only log while it runs, the captions in the source's
order when it ends.

    NAME.jsonl            the captions, one JSON object per line; written at the end, atomically
    NAME.manifest.json    what they were made with and how many: marks the file as finished
    NAME.jsonl.partial    the log of an unfinished run: its identity, then one row per sample
    NAME.faults.jsonl     what was skipped, by name
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
def open_log(
    file: Path,
    identity: Mapping[str, str],
    count: int,
    fingerprint: str,
    numbers: Callable[[], Mapping[str, int]],
) -> Iterator[CaptionLog]:
    """Hold the log of a caption file, for one process at a time.

    identity: what every caption is made with; another one raises UserError. count, fingerprint: of
    the source. numbers: key → number in the source, called only where captions of an earlier state
    of the source are there; those keep their images by key.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    busy = UserError(f"{file}: another run is writing it")
    with locked(file.with_name(f".{file.name}.lock"), busy=busy):
        yield CaptionLog(file, identity, count, fingerprint, numbers)


class CaptionLog:
    """The rows of a run; see :func:`open_log`. done: bool [n], which samples have a row. finished:
    the caption file holds all of this source."""

    def __init__(self, file: Path, identity, count: int, fingerprint: str, numbers):
        self.file, self._identity = file, dict(identity)
        self._header = {"identity": self._identity, "fingerprint": fingerprint}
        self.partial = file.with_name(f"{file.name}.partial")
        self.manifest = file.with_name(f"{file.stem}.manifest.json")
        self.faults = file.with_name(f"{file.stem}.faults.jsonl")
        # place of each sample's row in the log
        self._places = np.full(count, -1, np.int64)
        self.finished = False
        earlier: list[Iterable[Row]] = []
        if self.manifest.exists():
            made = read_manifest(self.manifest)
            self._compare(made["identity"], file)
            same = made.get("fingerprint") == fingerprint
            if same and file.exists() and not self.partial.exists():
                self.finished = True
                return
            if file.exists() and not same:
                earlier.append(read_lines(file))
        elif file.exists() and not self.partial.exists():
            raise UserError(
                f"{file} is there already and was not written by this command: give another --out"
            )
        header = self._read()
        if header and header["fingerprint"] != fingerprint:
            earlier.insert(0, self._rows())
        if not header or header["fingerprint"] != fingerprint:
            self._begin(earlier, numbers)
            self._read()

    @property
    def done(self) -> np.ndarray:
        return self._places >= 0

    def _compare(self, found: Mapping[str, str], where: Path) -> None:
        differences = [
            f"{name} {found.get(name)!r}, now {value!r}"
            for name, value in self._identity.items()
            if found.get(name) != value
        ]
        if differences:
            raise UserError(
                f"{where} was written with another {', '.join(differences)}: give the same, or "
                "another --out"
            )

    def _read(self) -> Row | None:
        """Read the log's header and the places of its rows; cut off a last line that a kill left
        incomplete. Returns None where there is no complete header."""
        if not self.partial.exists():
            return None
        header, place = None, 0
        with open(self.partial, "rb+") as log:
            for number, line in enumerate(log, 1):
                if not line.endswith(b"\n"):
                    log.truncate(place)
                    break
                try:
                    row = json.loads(line)
                    if number == 1:
                        header = {name: row[name] for name in self._header}
                        self._compare(header["identity"], self.partial)
                    elif row["index"] < len(self._places) and self._places[row["index"]] < 0:
                        self._places[row["index"]] = place
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.partial}, line {number}, is damaged: remove the line to have its "
                        "picture captioned again"
                        if number > 1
                        else f"{self.partial} does not begin as a captioning run's log does: give "
                        "another --out, or remove it"
                    ) from None
                place += len(line)
        return header

    def _begin(self, earlier: Sequence[Iterable[Row]], numbers) -> None:
        """Write a new log, with the captions of an earlier state of the source under their numbers
        in this one."""
        number_of = numbers() if earlier else {}
        taken: set[int] = set()
        lost = 0
        with atomic_write(self.partial) as out:
            out.write(_line(self._header))
            for row in (row for rows in earlier for row in rows if "left_out" not in row):
                number = number_of.get(row["key"])
                lost += number is None
                if number is not None and number not in taken:
                    taken.add(number)
                    out.write(_line({**row, "index": number}))
        self._places[:] = -1
        if earlier:
            gone = f", {lost} captions belong to pictures that are gone" if lost else ""
            message = (
                f"the source has changed since {self.file} was begun: {len(taken)} captions are "
                f"kept{gone}"
            )
            warnings.warn(message, Notice, stacklevel=2)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows; when this returns they are on the disk. A sample that has a row already gets no
        second one."""
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

    def _rows(self) -> Iterator[Row]:
        rows = read_lines(self.partial)
        next(rows)  # the header
        yield from rows

    def finalize(self, public: Callable[[Row], Row], facts: Row) -> None:
        """Write the caption file and its manifest, then remove the log. Killed in between, the next
        run does it again."""
        with atomic_write(self.file) as out:
            out.writelines(_line(public(row)) for row in self.rows() if "left_out" not in row)
        with atomic_write(self.faults) as out:
            for row in (row for row in self.rows() if "left_out" in row):
                kind, detail = row["left_out"]
                named = {"key": row["key"], "index": row["index"], "kind": kind, "detail": detail}
                out.write(_line(named))
        if not self.faults.stat().st_size:
            self.faults.unlink()
        write_json(self.manifest, {**self._header, **facts}, indent=1, ensure_ascii=False)
        self.partial.unlink()
        self.finished = True


def read_manifest(file: Path) -> Row:
    """Read a manifest. Raises UserError where it is damaged."""
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        made["identity"]
        return made
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is damaged: remove it to have the captions written again"
        ) from None


def read_lines(file: Path) -> Iterator[Row]:
    """The rows of a .jsonl file that this module wrote."""
    with open(file, "rb") as lines:
        yield from map(json.loads, lines)


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=True).encode() + b"\n"

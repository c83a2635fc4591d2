"""The file of a captioning run: a journal that only grows while it runs, and at its end the
captions in the source's order.

NAME.jsonl            the captions, one object a line; written whole, at the end NAME.manifest.json
what they were made of and how many: its presence says that the file is finished NAME.jsonl.partial
while the run goes on: a line of identity, then a line a sample, in the order in which they were
done NAME.faults.jsonl     what was left out, by name
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pixart_jax.errors import Notice, UserError


class CaptionLog:
    """One run's rows. Opened, it knows which samples are done (``done``, bool [n]) and refuses what
    was made in another way.

    identity: what every caption was made with, as strings. count, fingerprint: of the source.
    number_of: key → number in the source, called only where the source has changed since. A killed
    run leaves at most one cut line, which is cut off.
    """

    def __init__(
        self,
        file: Path,
        identity: dict[str, str],
        count: int,
        fingerprint: str,
        number_of: Callable[[], dict[str, int]],
    ):
        self.file, self._identity, self._fingerprint = Path(file), identity, fingerprint
        self.partial = self.file.with_name(f"{self.file.name}.partial")
        self.manifest = self.file.with_name(f"{self.file.stem}.manifest.json")
        self.faults = self.file.with_name(f"{self.file.stem}.faults.jsonl")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.file.with_name(f".{self.file.name}.lock"), "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{self.file}: another run is writing it") from None
        self.done = np.zeros(count, bool)
        self.finished = self._look()
        if not self.finished:
            self._open(number_of)

    def _look(self) -> bool:
        """Whether all is there already, of this very source. UserError where what is there is not
        ours."""
        if not self.manifest.is_file():
            if self.file.exists() and not self.partial.exists():
                raise UserError(
                    f"{self.file} is there already and was not written by this command: give "
                    "another --out"
                )
            return False
        made = read_manifest(self.manifest)
        self._compare(made.get("identity", {}), self.file)
        return (
            made.get("fingerprint") == self._fingerprint
            and self.file.is_file()
            and not self.partial.exists()
        )

    def _compare(self, found: dict[str, str], where: Path) -> None:
        other = [name for name in self._identity if found.get(name) != self._identity[name]]
        if other:
            told = ", ".join(
                f"{name} {found.get(name)!r}, now {self._identity[name]!r}" for name in other
            )
            raise UserError(
                f"{where} was written with another {told}: give the same, or another --out"
            )

    def _open(self, number_of) -> None:
        if self.partial.exists():
            _truncate_partial_line(self.partial)
        header = _header(self.partial) if self.partial.exists() else None
        if header is not None:
            self._compare(header["identity"], self.partial)
        if header is None or header["fingerprint"] != self._fingerprint:
            self._adopt(header is not None, number_of)
        for row, _ in self._rows(say=True):
            if 0 <= row["index"] < len(self.done):
                self.done[row["index"]] = True
        self._out = open(self.partial, "ab")

    def _adopt(self, partial: bool, number_of) -> None:
        """A new journal; captions of an earlier state of the source keep their pictures by key."""
        rows: list[Iterator[dict]] = [(row for row, _ in self._rows())] if partial else []
        if self.manifest.is_file() and self.file.is_file():
            rows.append(_captions(self.file))
        numbers = number_of() if rows else {}
        fresh, lost = self.partial.with_name(f".{self.partial.name}.new"), 0
        with open(fresh, "wb") as out:
            out.write(_line({"identity": self._identity, "fingerprint": self._fingerprint}))
            taken: set[int] = set()
            for row in (row for part in rows for row in part if "left_out" not in row):
                number = numbers.get(row["key"])
                if number is None:
                    lost += 1
                elif number not in taken:
                    taken.add(number)
                    out.write(_line({**row, "index": number}))
            _sync(out)
        os.replace(fresh, self.partial)
        _sync_folder(self.partial.parent)
        if rows:
            gone = f", {lost} captions belong to pictures that are gone" if lost else ""
            warnings.warn(
                f"the source has changed since {self.file} was begun: {len(taken)} captions are "
                f"kept{gone}",
                Notice,
                stacklevel=4,
            )

    def append(self, rows: Sequence[dict]) -> None:
        """Add rows for good: when this returns they are on the disk. A sample that is done already
        is not written again."""
        new = []
        for row in rows:
            if not self.done[row["index"]]:
                self.done[row["index"]] = True
                new.append(row)
        self._out.write(b"".join(map(_line, new)))
        _sync(self._out)

    def rows(self) -> Iterator[dict]:
        """Every row, in the order of the source; memory for one number a row."""
        order, places = [], []
        for row, place in self._rows():
            order.append(row["index"])
            places.append(place)
        _, first = np.unique(np.array(order, np.int64), return_index=True)
        with open(self.partial, "rb") as file:
            for place in np.array(places, np.int64)[first]:
                file.seek(place)
                yield json.loads(file.readline())

    def _rows(self, say: bool = False) -> Iterator[tuple[dict, int]]:
        """(row, its place in the file). A line that is none, as a machine that lost power may
        leave, is done again."""
        with open(self.partial, "rb") as file:
            place = len(file.readline())
            for number, line in enumerate(file, 2):
                try:
                    row = json.loads(line)
                    row["index"], row["key"]
                except (ValueError, KeyError, TypeError):
                    if say:
                        warnings.warn(
                            f"{self.partial}, line {number}, is damaged: its picture is captioned "
                            "again",
                            Notice,
                            stacklevel=5,
                        )
                else:
                    yield row, place
                place += len(line)

    def finalize(self, public: Callable[[dict], dict], facts: dict) -> None:
        """The journal → the caption file and its manifest; then the journal goes. Killed in
        between, it is done again."""
        write_lines(self.file, (public(row) for row in self.rows() if "left_out" not in row))
        left_out = (
            {
                "key": row["key"],
                "index": row["index"],
                "kind": row["left_out"][0],
                "detail": row["left_out"][1],
            }
            for row in self.rows()
            if "left_out" in row
        )
        write_lines(self.faults, left_out)
        if self.faults.stat().st_size == 0:
            self.faults.unlink()
        made = {"identity": self._identity, "fingerprint": self._fingerprint, **facts}
        whole = self.manifest.with_name(f".{self.manifest.name}.new")
        with open(whole, "w", encoding="utf-8") as out:
            json.dump(made, out, indent=1, ensure_ascii=False)
            _sync(out)
        os.replace(whole, self.manifest)
        self._out.close()
        self.partial.unlink()
        _sync_folder(self.file.parent)
        self.finished = True

    def close(self) -> None:
        if not self.finished:
            self._out.close()
        self._lock.close()

    def __enter__(self) -> CaptionLog:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def read_manifest(file: Path) -> dict:
    """A manifest; UserError where it is damaged."""
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        made["identity"]
        return made
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file} is damaged: remove it to have the captions written again"
        ) from None


def write_lines(file: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line; the file appears whole."""
    fresh = file.with_name(f".{file.name}.new")
    with open(fresh, "wb") as out:
        for row in rows:
            out.write(_line(row))
        _sync(out)
    os.replace(fresh, file)
    _sync_folder(file.parent)


def _captions(file: Path) -> Iterator[dict]:
    with open(file, "rb") as lines:
        for line in lines:
            yield json.loads(line)


def _header(partial: Path) -> dict | None:
    """The identity line; None where the file was killed before its first line was whole."""
    with open(partial, "rb") as file:
        line = file.readline()
    if not line:
        return None
    try:
        header = json.loads(line)
        header["identity"], header["fingerprint"]
        return header
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{partial} does not begin as a captioning run's journal does: give another --out, or "
            "remove it"
        ) from None


def _truncate_partial_line(file: Path) -> None:
    """Cut off a last line that was not written whole."""
    with open(file, "r+b") as data:
        end = data.seek(0, os.SEEK_END)
        keep = end
        while keep:
            start = max(0, keep - (1 << 16))
            data.seek(start)
            chunk = data.read(keep - start)
            if (at := chunk.rfind(b"\n")) >= 0:
                keep = start + at + 1
                break
            keep = start
        if keep != end:
            data.truncate(keep)
            _sync(data)


def _line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=True).encode() + b"\n"


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Bad records: named by file and record, counted by kind; in strict mode the first raises."""

from __future__ import annotations

import collections
import json
import os
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pixart_jax.errors import UserError
from pixart_jax.files import atomic_write
from pixart_jax.remote_path import Location


class BadRecord(NamedTuple):
    """place: file and record ('a.tar, 000123.jpg'). kind: a fixed name that is counted ('unreadable
    image'). detail: one line or ''. repaired: the record stays (a caption was cleaned)."""

    place: str
    kind: str
    detail: str = ""
    repaired: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}{f' ({self.detail})' if self.detail else ''}"


class BadRecords:
    """Bad records from any thread, each once, in the order found. strict: raise the first one."""

    def __init__(self, strict: bool = False, limit: int = 1_000_000):
        self.strict, self._limit = strict, limit
        self._named: dict[BadRecord, None] = {}
        self.counts: collections.Counter[str] = collections.Counter()  # skipped, by kind
        self.repaired: collections.Counter[str] = collections.Counter()
        self.unread: collections.Counter[str] = collections.Counter()  # other files, by suffix
        self._lock = threading.Lock()

    def add(self, place: str, kind: str, detail: str = "", repaired: bool = False) -> None:
        """Report a bad record. Raises UserError in strict mode."""
        record = BadRecord(_line(place), kind, _line(detail), repaired)
        if self.strict:
            what = "put right" if repaired else "left out"
            raise UserError(f"{record}; without --strict it would be counted and {what}")
        with self._lock:
            if record in self._named:
                return
            (self.repaired if repaired else self.counts)[kind] += 1
            if len(self._named) < self._limit:
                self._named[record] = None

    def add_unread(self, name: str, count: int = 1) -> None:
        """Count a file that is neither an image nor belongs to one; its suffix is kept."""
        with self._lock:
            self.unread[os.path.splitext(name)[1].lower() or "no suffix"] += count

    def extend(self, records: Iterable[BadRecord]) -> None:
        """Report several."""
        for record in records:
            self.add(*record)

    def __len__(self) -> int:
        """The number of skipped records."""
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[BadRecord]:
        return iter(list(self._named))

    def summary(self) -> str:
        """'3 left out: 2 unreadable image, 1 key twice; 1 mended: …; 6 other files …', or ''."""
        parts = []
        for what, counts in (("left out", self.counts), ("mended", self.repaired)):
            if counts:
                kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
                parts.append(f"{counts.total()} {what}: {kinds}")
        if self.unread:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.unread.most_common())
            parts.append(f"{self.unread.total()} other files not read: {kinds}")
        return "; ".join(parts)

    def report(self, used: int) -> str:
        """'100 read: 97 used, 3 left out: 2 unreadable image, …'; the numbers add up."""
        summary = self.summary()
        joined = f"{', ' if self.counts else '; '}{summary}" if summary else ""
        return f"{used + len(self):,} read: {used:,} used{joined}"

    def write(self, file: Location) -> bool:
        """Write a JSON object a line: place, kind, detail, mended; last the counts of other files.
        Without any, remove an earlier run's file. Return whether there is a file."""
        if not (self._named or self.unread):
            file.unlink(missing_ok=True)
            return False
        with atomic_write(file, "w", encoding="utf-8", errors="backslashreplace") as out:
            for place, kind, detail, mended in self._named:
                line = {"place": place, "kind": kind, "detail": detail, "mended": mended}
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
            if self.unread:
                out.write(json.dumps({"other files not read": self.unread}) + "\n")
            if more := self.counts.total() + self.repaired.total() - len(self._named):
                out.write(json.dumps({"not named": more}) + "\n")
        return True

    @classmethod
    def read(cls, file: Location) -> BadRecords:
        """Read a file of :meth:`write`; an empty list if there is none."""
        found = cls()
        for line in file.read_text("utf-8").splitlines() if file.exists() else ():
            row = json.loads(line)
            if "place" in row:
                found.add(row["place"], row["kind"], row["detail"], row["mended"])
            found.unread.update(row.get("other files not read", {}))
        return found


def _line(text: str, limit: int = 300) -> str:
    """One printable line of at most ``limit`` characters: others become spaces."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 2 * limit])
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"

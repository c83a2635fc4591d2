"""What is wrong with a set's records: each named by file and record, counted by kind, and the rest
goes on; or, strict, the first stops."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterable, Iterator

from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """place: the file, and the record in it ('a.tar, 000123.jpg'); kind: a few fixed words that are
    counted ('unreadable image', 'missing caption', 'key twice', 'cut file'); detail: what exactly,
    one line, may be empty; mended: put right (control characters taken out of a caption), and the
    record stays."""

    place: str
    kind: str
    detail: str = ""
    mended: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}{f' ({self.detail})' if self.detail else ''}"


class BadRecords:
    """Collects faults, in the order they were found, each once; threads may report at once.

    strict: the first one is raised as a UserError. kept: so many are kept by name, more are counted
    alone, so that a set whose every record is bad does not fill the memory.
    """

    def __init__(self, strict: bool = False, kept: int = 10_000):
        self.strict, self._most = strict, kept
        self._kept: dict[BadRecord, None] = {}
        self.counts: collections.Counter[str] = collections.Counter()  # of what was left out
        self.mended: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def add(self, place: str, kind: str, detail: str = "", mended: bool = False) -> None:
        """Report one. UserError where strict."""
        fault = BadRecord(_line(place), kind, _line(detail), mended)
        if self.strict:
            raise UserError(
                f"{fault}; without --strict it would be counted and "
                f"{'put right' if mended else 'left out'}"
            )
        with self._lock:
            if fault in self._kept:
                return
            (self.mended if mended else self.counts)[kind] += 1
            if len(self._kept) < self._most:
                self._kept[fault] = None

    def extend(self, faults: Iterable[BadRecord]) -> None:
        """Report several."""
        for fault in faults:
            self.add(fault.place, fault.kind, fault.detail, fault.mended)

    def __len__(self) -> int:
        """How many were left out."""
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[BadRecord]:
        return iter(list(self._kept))

    def summary(self) -> str:
        """'3 left out: 2 unreadable image, 1 key twice; 1 mended: 1 control characters'; '' where
        there is none."""
        said = []
        for what, counts in (("left out", self.counts), ("mended", self.mended)):
            if counts:
                said.append(
                    f"{counts.total()} {what}: "
                    + ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
                )
        return "; ".join(said)


def _line(text: str, most: int = 300) -> str:
    """One printable line: control characters and line breaks as spaces, at most ``most``
    characters."""
    shown = "".join(c if c.isprintable() else " " for c in text[: 2 * most])
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"

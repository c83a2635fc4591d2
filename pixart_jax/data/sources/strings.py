"""Millions of short texts in little memory, and the index of one by its value."""

from __future__ import annotations

import array
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

# bytes; what is beyond lies in a temporary file, where the page cache may forget it
_IN_MEMORY = 2**28


class StringTable:
    """Texts by number, as one block of UTF-8: eight bytes each beside their own, where Python's
    objects take sixty.

    A block that outgrows 256 MiB goes on in a temporary file without a name. Threads may read while
    nobody appends.
    """

    def __init__(self, texts: Iterable[str] = ()):
        self._block, self._ends = bytearray(), array.array("Q", [0])
        self._file = None
        self._filed = 0  # bytes of the file
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._block += text.encode("utf-8", "replace")
        self._ends.append(self._filed + len(self._block))
        if len(self._block) > _IN_MEMORY:
            self._file = self._file or tempfile.TemporaryFile()
            self._file.write(self._block)
            self._file.flush()
            self._filed, self._block = self._filed + len(self._block), bytearray()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def raw(self, index: int) -> bytes:
        start, end = self._ends[index], self._ends[index + 1]
        if start >= self._filed:
            return bytes(self._block[start - self._filed : end - self._filed])
        return os.pread(self._file.fileno(), end - start, start)

    def __getitem__(self, index: int) -> str:
        return self.raw(index).decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


def _hashes(texts: StringTable) -> np.ndarray:
    """uint64 [n]: of each text."""
    out = np.empty(len(texts), np.uint64)
    for i in range(len(texts)):
        out[i] = _hash(texts.raw(i))
    return out


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


class StringIndex:
    """text → its number in ``texts``, the first where it stands several times; 16 bytes a text."""

    def __init__(self, texts: StringTable):
        self._texts = texts
        hashes = _hashes(texts)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def find(self, text: str) -> int:
        """−1 where it is not among them."""
        wanted = text.encode("utf-8", "replace")
        value = np.uint64(_hash(wanted))
        at = int(np.searchsorted(self._sorted, value))
        while at < len(self._sorted) and self._sorted[at] == value:
            if self._texts.raw(int(self._order[at])) == wanted:
                return int(self._order[at])
            at += 1
        return -1

    def repeats(self) -> np.ndarray:
        """bool [n]: where a text stands that stood before."""
        out = np.zeros(len(self._sorted), bool)
        alike = np.flatnonzero(self._sorted[1:] == self._sorted[:-1]) + 1
        for at in alike:
            number = int(self._order[at])
            out[number] = self.find(self._texts[number]) != number
        return out

"""Counts of more distinct words than memory holds, and keys seen before: both exact, both
bounded."""

from __future__ import annotations

import hashlib
import heapq
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

RUNS = 32  # sorted files that are merged at once


class NounTable:
    """noun → how often. At most ``limit`` nouns are in memory; beyond it they go, sorted, into a
    file, and are added up when read.

    A noun has no tab and no line break. 4,000,000 of them are some 0.4 GB of Python objects.
    """

    def __init__(self, limit: int = 4_000_000, folder: str | os.PathLike | None = None):
        self._limit = max(1, limit)
        self._counts: dict[str, int] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="nouns-", dir=folder)
        self._runs: list[Path] = []
        self._made = 0
        self.spills = 0

    def add(self, counts: Mapping[str, int]) -> None:
        mine = self._counts
        for noun, count in counts.items():
            mine[noun] = mine.get(noun, 0) + count
        if len(mine) > self._limit:
            self._spill()

    def _spill(self) -> None:
        self._runs.append(self._write((noun, self._counts[noun]) for noun in sorted(self._counts)))
        self._counts = {}
        self.spills += 1
        if len(self._runs) >= RUNS:
            merged = self._write(_added(map(_run, self._runs)))
            for run in self._runs:
                run.unlink()
            self._runs = [merged]

    def _write(self, items) -> Path:
        self._made += 1
        path = Path(self._folder.name) / f"{self._made:06d}"
        with open(path, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as out:
            out.writelines(f"{noun}\t{count}\n" for noun, count in items)
        return path

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """(noun, count), sorted by noun, each once."""
        memory = ((noun, self._counts[noun]) for noun in sorted(self._counts))
        return _added([*map(_run, self._runs), memory])

    def close(self) -> None:
        self._folder.cleanup()

    def __enter__(self) -> NounTable:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _run(path: Path) -> Iterator[tuple[str, int]]:
    with open(path, encoding="utf-8", errors="surrogatepass", newline="\n") as lines:
        for line in lines:
            noun, _, count = line.rpartition("\t")
            yield noun, int(count)


def _added(runs) -> Iterator[tuple[str, int]]:
    last, total = None, 0
    for noun, count in heapq.merge(*runs):
        if noun == last:
            total += count
            continue
        if last is not None:
            yield last, total
        last, total = noun, count
    if last is not None:
        yield last, total


class KeysSeen:
    """Which keys came before, 8 bytes each: sorted arrays of 64-bit hashes, merged as they grow.
    Among 10 million keys two different ones share a hash with a chance of 3 in a million."""

    def __init__(self):
        self._levels: list[np.ndarray] = []  # sorted, each more than twice as long as the next

    def new(self, keys: Sequence[str]) -> list[bool]:
        """For each key whether it comes for the first time; remembers them all."""
        hashes = np.array([_hash(key) for key in keys], np.uint64)
        fresh = np.zeros(len(hashes), bool)
        fresh[np.unique(hashes, return_index=True)[1]] = True
        for level in self._levels:
            at = np.minimum(np.searchsorted(level, hashes), len(level) - 1)
            fresh &= level[at] != hashes
        if fresh.any():
            self._levels.append(np.sort(hashes[fresh]))
            while len(self._levels) > 1 and len(self._levels[-2]) <= 2 * len(self._levels[-1]):
                last = self._levels.pop()
                self._levels[-1] = np.sort(np.concatenate([self._levels[-1], last]), kind="stable")
        return fresh.tolist()


def _hash(key: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )

"""Encoded shards of a bucket on local disk: fetched whole, checked by the manifest's checksums, the
least recently used deleted where they would fill more than their share of the disk."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pixart_jax import files
from pixart_jax.errors import UserError
from pixart_jax.remote_path import RemotePath

if TYPE_CHECKING:
    from pixart_jax.data.records import Shard

CACHE_GB = 100.0
_FETCHERS = 4  # threads that fetch what is read next; each shard comes in parallel ranges


class ShardCache:
    """The shards of ``folder``; of all such folders about ``gigabytes`` (10⁹ bytes) stay."""

    def __init__(self, folder: RemotePath, shards: Sequence[Shard], gigabytes: float):
        self._folder, self._shards, self._limit = folder, shards, gigabytes * 1e9
        self._asked: set[int] = set()
        self._paths: dict[int, Path] = {}
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    @property
    def open_at_most(self) -> int:
        """How many of the largest shard fit."""
        largest = max((shard.bytes for shard in self._shards), default=1)
        return max(1, int(self._limit / largest))

    def check_holds(self, window: int) -> None:
        """Raise UserError unless the shards fit that a shuffled order needs at a time: all, or of
        each bucket two windows, one that is read and one that is fetched."""
        sizes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for shard in self._shards:
            sizes[shard.bucket].append(shard.bytes)
        kept = [sorted(some)[-2 * window :] if window else some for some in sizes.values()]
        if (needed := sum(map(sum, kept))) > self._limit:
            one = "" if window else " data.shuffle_shards, such as 4, shuffles so many at a time;"
            raise UserError(
                f"{self._folder}: shuffling needs {needed / 1e9:.3g} GB of shards on the disk at a "
                f"time and data.cache_gb is {self._limit / 1e9:g}:{one} or allow more"
            )

    def path(self, number: int) -> Path:
        """A shard's file on the disk, fetched where it is not there. UserError where its bytes are
        not those of the manifest."""
        shard = self._shards[number]
        address = self._folder / shard.file
        path = self._paths[number] = self._held(number) or files.stage(str(address), quiet=True)
        mark = path.with_name(f".{path.name}.checked")
        if not mark.exists():
            with open(path, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                path.unlink(missing_ok=True)
                raise UserError(f"{address} is damaged: its checksum differs from the manifest's")
        mark.touch()
        self._make_room(mark)
        return path

    def _held(self, number: int) -> Path | None:
        path = self._paths.get(number)
        return path if path is not None and path.exists() else None

    def _make_room(self, last: Path) -> None:
        used = {}
        for mark in last.parent.parent.glob("*/.*.checked"):
            with contextlib.suppress(FileNotFoundError):  # another process deleted it first
                size = mark.with_name(mark.name[1:].removesuffix(".checked")).stat().st_size
                used[mark] = mark.stat().st_mtime_ns, size
        total = sum(size for _, size in used.values())
        for mark, (_, size) in sorted(used.items(), key=lambda item: item[1]):
            if total <= self._limit or mark == last:
                return
            mark.with_name(mark.name[1:].removesuffix(".checked")).unlink(missing_ok=True)
            mark.unlink(missing_ok=True)
            total -= size

    def fetch(self, numbers: Iterable[int]) -> None:
        """Have threads fetch these, in order."""
        while len(self._threads) < _FETCHERS:
            self._threads.append(threading.Thread(target=self._fetch_asked, daemon=True))
            self._threads[-1].start()
        for number in numbers:
            if number not in self._asked and self._held(number) is None:
                self._asked.add(number)
                self._queue.put(number)

    def _fetch_asked(self) -> None:
        while True:
            number = self._queue.get()
            with contextlib.suppress(Exception):  # the reader will meet it
                self.path(number)
            self._asked.discard(number)

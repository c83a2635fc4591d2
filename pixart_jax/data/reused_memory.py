"""Arrays whose memory is used again once nobody holds them.

A batch of text states is a quarter of a gigabyte. Fresh memory of that size is given back to the
system with each batch and cleared by it, page by page, for the next one, which costs as much as
reading the records. Here it goes back to a pool instead, and not before the last array, view or
device buffer that looks at it is gone: the array's memory belongs to a lease, and whoever looks at
it keeps the lease.
"""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Sequence

import numpy as np


class _Lease:
    """Holds the memory of one array; lets the pool have it back when the array and all views of it
    are gone."""

    def __init__(self, back: collections.deque, memory: np.ndarray):
        self._back, self._memory = back, memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self):
        # atomic: a lease may end at any moment, in any thread, whatever lock that holds
        self._back.append(self._memory)


class BufferPool:
    """A pool; threads may take from it at once. most: so many blocks of memory lie free at the
    most; the oldest go first."""

    def __init__(self, most: int = 4):
        self._most = most
        self._free: list[np.ndarray] = []
        self._back: collections.deque[np.ndarray] = collections.deque()
        self._lock = threading.Lock()

    def empty(self, shape: Sequence[int], dtype) -> np.ndarray:
        """An array of any content, as numpy.empty gives it."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        with self._lock:
            while self._back:
                self._free.append(self._back.popleft())
            fits = [at for at, memory in enumerate(self._free) if memory.nbytes == size]
            memory = self._free.pop(fits[-1]) if fits else np.empty(size, np.uint8)
            del self._free[: max(0, len(self._free) - self._most)]
        return np.asarray(_Lease(self._back, memory)).view(dtype).reshape(shape)


def keep_freed_memory() -> None:
    """Let the C library keep blocks of up to a few megabytes when they are freed, for the next one
    of their size.

    glibc gives a block beyond a threshold back to the system, which clears every page of the next
    one: a third of the work of reading a record of a megabyte. The threshold rises to the largest
    block ever freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD).
    """
    np.empty(31 << 20, np.uint8)  # and freed at once, never touched

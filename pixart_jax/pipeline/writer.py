"""Files written by threads while the devices draw on."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Callable

MOST = 64  # images that wait; of 1024 px, 200 MB
# the packing of one PNG of 1024 px keeps a core busy for a third of a second, and works without
# Python's lock
_THREADS = 4


class AsyncWriter:
    """Calls ``write(*arguments)`` in threads, for a with statement.

    :meth:`put` returns at once while fewer than ``most`` calls wait, so a slow disk holds nobody up
    until then, and memory stays bounded after it. What a call raised is raised by the next put, or
    at the end.
    """

    def __init__(self, write: Callable[..., object], most: int = MOST):
        self._write = write
        self._room = threading.BoundedSemaphore(most)
        self._pool = concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
        self._fault: BaseException | None = None

    def put(self, *arguments) -> None:
        """Have it written soon."""
        self._room.acquire()
        if self._fault is not None:
            self._room.release()
            raise self._fault
        self._pool.submit(self._call, arguments)

    def _call(self, arguments) -> None:
        try:
            if self._fault is None:  # on a full disk each further file would fail as this one did
                self._write(*arguments)
        except BaseException as fault:
            self._fault = fault
        finally:
            self._room.release()

    def __enter__(self) -> AsyncWriter:
        return self

    def __exit__(self, kind, fault, traceback) -> None:
        self._pool.shutdown(wait=True)
        if kind is None and self._fault is not None:
            raise self._fault

"""The images that an answer names by a URL."""

from __future__ import annotations

import collections
import re
import secrets
import threading
import time

MAX_AGE = 3600  # seconds, as OpenAI's
MAX_BYTES = 2**28
_NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")


class ImageStore:
    """Files in memory by names that nobody can guess; the oldest go first."""

    def __init__(self) -> None:
        self._files: collections.OrderedDict[str, tuple[float, bytes]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def put(self, data: bytes, kind: str) -> str:
        """The name of the file."""
        name = f"{secrets.token_hex(16)}.{kind}"
        with self._lock:
            self._files[name] = time.monotonic(), data
            total = sum(len(one) for _, one in self._files.values())
            while total > MAX_BYTES and len(self._files) > 1:
                total -= len(self._files.popitem(last=False)[1][1])
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """(the file, png, jpeg or webp); None for a name that is none, and after MAX_AGE."""
        found = _NAME.fullmatch(name)
        with self._lock:
            while self._files and time.monotonic() - next(iter(self._files.values()))[0] > MAX_AGE:
                self._files.popitem(last=False)
            if found is None or name not in self._files:
                return None
            return self._files[name][1], found[1]

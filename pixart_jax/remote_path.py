"""Files and folders of a disk or of a bucket under pathlib's names, for those who read either.

located("s3://bucket/set") / "manifest.json"    a RemotePath, over the requests of files.py
located("set") / "manifest.json"                a pathlib.Path
"""

from __future__ import annotations

import fnmatch
import functools
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pixart_jax import files
from pixart_jax.errors import UserError

REQUESTS = 64  # in flight, where many small objects are read
_SHORT = re.compile("^(gs|s3):/(?!/)")  # what pathlib.Path makes of gs://


class Status(NamedTuple):
    """As of os.stat; instead of a time, a text that changes with the content."""

    st_size: int
    st_mtime_ns: str


class RemotePath(PurePosixPath):
    """An object of a bucket, or what lies below an address. What an instance has once read of
    the bucket it keeps: an object's status, a listing."""

    def __str__(self) -> str:
        return _SHORT.sub(r"\1://", super().__str__())

    def stat(self) -> Status:
        """Raises FileNotFoundError."""
        if "status" not in self.__dict__:
            self.status = Status(*files.stat(str(self)))
        return self.status

    @functools.cached_property
    def names(self) -> dict[str, Status]:
        """Name from here → status of every object below, in order."""
        start = len(str(self)) + 1
        found = files.list_files(str(self))
        return {entry.address[start:]: Status(entry.size, entry.version) for entry in found}

    def listed(self, name: str) -> RemotePath:
        """One of ``names``."""
        path = self / name
        path.status = self.names[name]
        return path

    def is_file(self) -> bool:
        try:
            return bool(self.stat())
        except FileNotFoundError:
            return False

    exists = is_file

    def is_dir(self) -> bool:
        return bool(self.names)

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """The objects that match; ``*`` stands for no slash."""
        depth = pattern.count("/")
        for name in self.names:
            if name.count("/") == depth and fnmatch.fnmatchcase(name, pattern):
                yield self.listed(name)

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """The objects below whose own name matches."""
        own = ((name, name.rpartition("/")[2]) for name in self.names)
        return (self.listed(name) for name, last in own if fnmatch.fnmatchcase(last, pattern))

    def resolve(self) -> RemotePath:
        return self

    def open(
        self, mode: str = "rb", buffering: int = 1 << 16, start: int = 0, stop: int | None = None
    ) -> io.BufferedReader:
        """The object, or its bytes start … stop − 1, as a file whose requests are for ``buffering``
        bytes, or more where a read asks for more."""
        return io.BufferedReader(_Ranges(self, start, stop), buffering)

    def read_bytes(self) -> bytes:
        return files.read_bytes(str(self))

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def touch(self) -> None:
        files.put(str(self), b"")

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing: objects need no folders."""

    def unlink(self, missing_ok: bool = True) -> None:
        files.delete(str(self))


Location = Path | RemotePath
"""Of a command's flag: that it takes addresses of buckets too."""


def located(path: str | os.PathLike) -> Location:
    """An address as a RemotePath, anything else as a Path. UserError for a scheme other than gs://
    and s3://."""
    if isinstance(path, RemotePath):
        return path
    text = _SHORT.sub(r"\1://", os.fspath(path))
    return RemotePath(text) if files.is_remote(text) else Path(path)


def local(path: str | os.PathLike) -> Path:
    """A path itself, or the staged copy of an address."""
    return files.stage(str(located(path)))


class _Ranges(io.RawIOBase):
    """Bytes start … stop − 1 of an object; every read is one request."""

    def __init__(self, path: RemotePath, start: int, stop: int | None):
        size, self._version = path.stat()
        self._address, self._start = str(path), start
        self._size = (size if stop is None else stop) - start
        if start + self._size > size:
            raise UserError(f"{path} has become shorter since it was opened")
        self._at = 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def _take(self, count: int) -> bytes:
        first = self._start + self._at
        stop = min(first + count, self._start + self._size)
        data = files.read_range(self._address, first, stop, self._version)
        self._at += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._take(max(self._size - self._at, 0))

"""Files: the cache folder, atomic writes, locks, JSON, hashes and safetensors headers; and
addresses, which name a local file or an object of a gs:// or s3:// bucket.

object_store.py holds what concerns buckets alone; no cloud library is imported before one is used.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from pixart_jax import object_store
from pixart_jax.errors import Notice, UserError
from pixart_jax.object_store import Conflict as Conflict
from pixart_jax.object_store import Entry as Entry
from pixart_jax.object_store import Stat as Stat

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Name in a safetensors header → dtype. The safetensors package has no bfloat16 for NumPy."""
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


Address = str | os.PathLike
"""A local path, or the text gs://BUCKET/KEY or s3://BUCKET/KEY. A Path never names a bucket."""


def cache_folder(keep: bool = False) -> Path:
    """Where prepared data sets, encoded shards and converted weights are cached: $PIXART_JAX_CACHE,
    else ~/.cache/pixart_jax.

    If it cannot be written: a temporary folder of this process, with a warning; with ``keep``, for
    results that must outlast the process, a UserError.
    """
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pixart_jax")
    return _writable(os.path.expanduser(os.environ.get("PIXART_JAX_CACHE") or default), keep)


@functools.lru_cache
def _writable(folder: str, keep: bool) -> Path:
    try:
        if folder.startswith("~"):
            raise OSError("no home folder is known")
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Path(folder)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        what = f"the cache folder {folder} cannot be written ({reason})"
        if keep:
            raise UserError(f"{what}: name another one in PIXART_JAX_CACHE") from None
        made = tempfile.mkdtemp(prefix="pixart_jax-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        message = f"{what}: nothing is cached for the next start; PIXART_JAX_CACHE names another"
        warnings.warn(message, Notice, stacklevel=3)
        return Path(made)


def bundled(name: str) -> Path:
    """A folder that the project ships, ``configs`` or ``assets``: beside the package in a clone, in
    the package (as recipes and assets) in an installed wheel."""
    package = Path(__file__).resolve().parent
    installed = package / {"configs": "recipes"}.get(name, name)
    return installed if installed.is_dir() else package.parent / name


def find(path: str | os.PathLike) -> Path:
    """A path as it is where it exists; else, for assets/…, the shipped one."""
    path = Path(path).expanduser()
    shipped = bundled("assets").parent / path
    return shipped if path.parts[:1] == ("assets",) and not path.exists() else path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb", **options) -> Iterator[IO]:
    """A file that replaces ``path`` when the block ends, complete and synced, with the permissions
    of a new file; after an exception ``path`` is as it was. options: of ``open`` (encoding …).

    The half-written file is a hidden sibling, locked while its process lives. The first write into
    a folder removes those that killed processes left there. A bucket's object is written at the
    end.
    """
    if is_remote(path):
        raw = io.BytesIO()
        file: Any = raw if "b" in mode else io.TextIOWrapper(raw, **options)
        yield file
        file.flush()
        put(path, raw.getvalue())
        return
    path = Path(path)
    _remove_unlocked(path.parent)
    linked = 0
    while not linked:  # another process may have removed it before it was locked
        prefix = f".{path.name[:40]}."
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=".part", dir=path.parent)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        linked = os.fstat(handle).st_nlink
    try:
        with os.fdopen(handle, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp's files are readable by their owner alone
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@functools.lru_cache
def _remove_unlocked(folder: Path) -> None:
    for left in folder.glob(f".*.{'?' * 8}.part"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        file.write(text)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 2, **options) -> None:
    """Write JSON atomically, with a final newline. options: of ``json.dumps``."""
    write_text(path, json.dumps(value, indent=indent, **options) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def locked(
    path: str | os.PathLike,
    *,
    busy: Exception | None = None,
    on_wait: Callable[[], None] | None = None,
) -> Iterator[IO]:
    """Hold an exclusive lock on ``path`` (created, and left behind) for the block.

    A lock that another process holds raises ``busy`` where it is given, and else is waited for,
    after a call of ``on_wait``. The kernel releases the lock when its process ends.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy is not None:
                raise busy from None
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def is_remote(address: Address) -> bool:
    """Whether an address lies in a bucket. UserError for another scheme:// or without a bucket."""
    text = os.fspath(address)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)([^/]*)", text)
    if found is None or (found[1] not in ("gs", "s3") and not found[2]):
        return False
    if found[1] not in ("gs", "s3"):
        raise UserError(f"{text}: addresses begin with gs:// or s3://, others are local paths")
    if not (found[2] and found[3]):
        raise UserError(f"{text}: write {found[1]}://BUCKET/NAME")
    return True


def join(address: Address, *parts: str) -> Any:
    """The address of something below another: text for a bucket, a Path for a local one."""
    if is_remote(address):
        return "/".join([str(address).rstrip("/"), *parts])
    return Path(address, *parts)


def read_bytes(address: Address) -> bytes:
    """All of a file; FileNotFoundError where there is none.

    This and what follows raises UserError for a bucket that is not there or not allowed, missing
    credentials and a missing extra, and Unavailable for an outage that outlasts the retries.
    """
    if is_remote(address):
        return object_store.read(str(address), None, None, None)
    return Path(address).read_bytes()


def read_range(address: Address, start: int, stop: int, version: str | None = None) -> bytes:
    """Bytes start … stop − 1; fewer at the end of the file. version: UserError if it has another
    (of buckets only)."""
    if is_remote(address):
        return object_store.read(str(address), start, stop, version)
    with open(address, "rb") as file:
        return os.pread(file.fileno(), max(stop - start, 0), start)


def stat(address: Address) -> Stat:
    """Size and version; FileNotFoundError where there is no such file."""
    if is_remote(address):
        return object_store.stat(str(address))
    found = os.stat(address)
    return Stat(found.st_size, str(found.st_mtime_ns))


def exists(address: Address) -> bool:
    """Whether there is such a file."""
    try:
        return stat(address).size >= 0
    except FileNotFoundError:
        return False


def list_files(folder: Address) -> list[Entry]:
    """All files below a folder at any depth, by name; [] where there are none."""
    if is_remote(folder):
        return object_store.list_files(str(folder))
    found = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return [Entry(str(path), *stat(path)) for path in found]


def put(address: Address, data: bytes) -> None:
    """Write a file atomically, over another if there is one."""
    if is_remote(address):
        object_store.put(str(address), data)
        return
    with atomic_write(address) as file:
        file.write(data)


def create(address: str, data: bytes) -> str:
    """Write an object where there is none; returns its version, raises Conflict.

    Of buckets only, as ``replace``. data must differ from what any other would write, say by a
    random token: a repeated request that finds the very same data takes it for its own.
    """
    return object_store.write_if(address, data, "")


def replace(address: str, data: bytes, version: str) -> str:
    """Write over an object that still has ``version``; returns the new one, raises Conflict. data:
    see :func:`create`."""
    return object_store.write_if(address, data, version)


def delete(address: Address) -> None:
    """Remove a file if it is there."""
    if is_remote(address):
        object_store.delete(str(address))
    else:
        Path(address).unlink(missing_ok=True)


def check_writable(folder: str) -> None:
    """UserError where objects of a bucket cannot be created, read and deleted, or where its store
    ignores conditional writes. Call it before long work."""
    key, data = join(folder, f".probe-{secrets.token_hex(8)}"), secrets.token_bytes(16)
    create(key, data)
    try:
        create(key, data[::-1] + b".")
    except Conflict:
        if read_bytes(key) != data:
            raise UserError(f"{folder}: what is written there is not read back") from None
    else:
        raise UserError(
            f"{folder}: this store ignores conditional writes (If-None-Match), so no run in it can "
            "be kept from a second writer; name a bucket of another store"
        )
    finally:
        delete(key)


def upload(path: str | os.PathLike, address: str, last: str | None = None) -> None:
    """Copy a local file, or the files below a folder, to an address of a bucket. last: the name of
    the file whose presence says that the folder is complete."""
    path = Path(path)
    if path.is_file():
        object_store.upload([(path, address)])
        return
    files = sorted(file for file in path.rglob("*") if file.is_file())
    pairs = [(file, join(address, file.relative_to(path).as_posix())) for file in files]
    object_store.upload([pair for pair in pairs if pair[0] != path / (last or "")])
    object_store.upload([pair for pair in pairs if pair[0] == path / (last or "")])


def stage(
    address: Address, wanted: Callable[[str], bool] | None = None, quiet: bool = False
) -> Path:
    """The local copy of an object, or a folder with all objects below an address, of which
    ``wanted`` takes some by their relative names; a local path as it is. quiet: without a bar.

    Copies lie under cache_folder()/staged, one for each version, with mtimes that are the same on
    each machine. Processes of a machine wait for the one that fetches. UserError where the address
    names nothing.
    """
    if not is_remote(address):
        return Path(address)
    address = str(address).rstrip("/")
    try:
        entries, root = [Entry(address, *stat(address))], address.rpartition("/")[0]
    except FileNotFoundError:
        entries, root = list_files(address), address
    named = [(entry.address[len(root) + 1 :], entry) for entry in entries]
    if wanted is not None and root == address:
        named = [(name, entry) for name, entry in named if wanted(name)]
    if not named:
        raise UserError(f"{address}: no such object, and none below it")
    text = repr((address, [(name, *entry[1:]) for name, entry in named]))
    place = cache_folder() / "staged" / f"{hash64(text):016x}"
    folder = place / address.rpartition("/")[2] if root == address else place
    folder.mkdir(parents=True, exist_ok=True)
    with locked(place / ".lock"):
        paths = [(entry, folder / name) for name, entry in named]
        if missing := [(entry, path) for entry, path in paths if not path.exists()]:
            object_store.download("" if quiet else address, missing)
    return folder if root == address else folder / named[0][0]


def hash64(text: str) -> int:
    """64 bits of a hash of a text, the same on every machine."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def folder_fingerprint(folder: str | os.PathLike) -> str:
    """Ten hex digits that change when a folder's files do, or a file does: of their names, sizes
    and some of their bytes, all of a small file's."""
    digest, folder = hashlib.sha256(), Path(folder)
    for path in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in range(0, size, max(1 << 16, size // 16)):
                    file.seek(start)
                    digest.update(file.read(1 << 16))
    return digest.hexdigest()[:10]


def safetensors_header(
    tensors: Iterable[tuple[str, Any]], metadata: Mapping[str, str], align: int
) -> bytes:
    """The first bytes of a safetensors file whose data are the ``tensors``, each with .shape and
    .dtype, one after the other; padded so that the data begin at a multiple of ``align`` bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors:
        dtype, shape = np.dtype(tensor.dtype), list(tensor.shape)
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": shape}
        header[name]["data_offsets"] = [start, end]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text

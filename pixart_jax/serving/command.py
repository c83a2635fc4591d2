"""``python -m pixart_jax serve``: one process with a web page, an OpenAI-compatible API and MCP."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
import uvicorn

from pixart_jax import cli
from pixart_jax.errors import Notice, UserError
from pixart_jax.serving import api, mcp_server
from pixart_jax.serving.engine import Engine
from pixart_jax.serving.guard import Access
from pixart_jax.serving.opening import EngineFlags

KEY = "PIXART_API_KEY"


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a server listens, and who may call it."""

    host: str = "127.0.0.1"
    """Address to listen at; one beyond loopback needs an API key."""
    port: int = 8000
    """0: any that is free."""
    api_key_file: Path | None = None
    """Keys that callers need, one a line, KEY or NAME:KEY; one may also be in $PIXART_API_KEY."""
    auth: bool = True
    """--no-auth: listen beyond loopback without a key."""
    public_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A name that callers may use beside those of loopback; '*': any (behind a balancer)."""

    def access(self, public: bool = False, **more: Any) -> Access:
        """public: callers may use any name. more: fields of Access. Raises UserError for an
        unusable file, and where a key is needed."""
        lines = [os.environ[KEY]] if os.environ.get(KEY) else []
        if self.api_key_file is not None:
            lines += self.api_key_file.read_text().splitlines()
        found = {}
        for number, line in enumerate(line.strip() for line in lines):
            name, _, key = line.rpartition(":")
            if key:
                found[name or f"key{number}"] = hashlib.sha256(key.encode()).digest()
        if self.api_key_file is not None and not found:
            raise UserError(f"{self.api_key_file} holds no key: one a line is needed")
        if not found and self.auth and self.host not in ("127.0.0.1", "localhost", "::1"):
            raise UserError(
                f"--host {self.host} lets others in: give --api-key-file or {KEY}, or --no-auth"
            )
        names = [*map(str.lower, self.public_host), "*" if public else self.host.lower()]
        return Access(found if self.auth else {}, tuple(names), **more)

    def listen(self) -> tuple[socket.socket, str]:
        """(the listening socket, its address for people). Raises UserError where it cannot be."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            found = socket.socket(family, kind, protocol)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(2048)  # early callers wait
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            where = f"{self.host}, port {self.port} ({reason})"
            raise UserError(f"cannot listen at {where}: --port 0 finds a free one") from None
        shown = "localhost" if self.host in ("0.0.0.0", "::") else self.host
        return found, f"http://{shown}:{found.getsockname()[1]}"


@dataclasses.dataclass(frozen=True)
class Flags:
    """Serve a model: a web page at /, an OpenAI-compatible API at /v1 and MCP at /mcp."""

    engine: tyro.conf.OmitArgPrefixes[EngineFlags] = EngineFlags()
    endpoint: tyro.conf.OmitArgPrefixes[Endpoint] = Endpoint()
    trusted_proxy: str = ""
    """Address of a proxy whose X-Forwarded-For counts; with commas between several."""
    rate: float = 0
    """Requests for images a minute, of each key or address; 0: any."""
    page: bool = True
    """Also serve the web page."""
    drain_delay: float = 0
    """Seconds from SIGTERM, when /readyz begins to fail, until the socket is closed."""
    grace: int = 60
    """Seconds that requests in flight have to finish after it."""
    log_prompts: bool = False
    """Also log prompts."""


def main(argv: Sequence[str]) -> int:
    """All that the user can get wrong is found before weights are read."""
    flags = cli.parse(Flags, argv, prog="python -m pixart_jax serve")
    failures: list[Exception] = []

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app, engine = make_app(flags, fail)
    listening, where = flags.endpoint.listen()

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            waiting = engine.state != "draining" and flags.drain_delay > 0
            engine.drain()
            leave = super().handle_exit
            if waiting:
                threading.Timer(flags.drain_delay, leave, (sig, frame)).start()
            else:
                leave(sig, frame)

    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        server_header=False,
        # longer than a client waits after a 429, whose next request must not meet the closing
        timeout_keep_alive=75,
        timeout_graceful_shutdown=flags.grace,
        proxy_headers=bool(flags.trusted_proxy),
        forwarded_allow_ips=flags.trusted_proxy or None,
    )
    server = Server(config)
    print(
        f"{flags.engine.model} at {where} (API: {where}/v1, MCP: {where}/mcp); Ctrl-C ends",
        flush=True,
    )
    server.run(sockets=[listening])
    if failures:
        raise failures[0]
    return 0


def make_app(
    flags: Flags, on_failure: Callable[[Exception], None] = lambda error: None, public: bool = False
) -> tuple[Any, Engine]:
    """(the app, its engine). public: callers may use any name of this server, and Ray has bound
    the address."""
    access = flags.endpoint.access(public, rate=flags.rate, log_prompts=flags.log_prompts)
    _log_to_stderr()
    warnings.simplefilter("ignore", Notice)  # their texts name prompts
    engine, offer = flags.engine.build(on_failure)
    service = api.Service(engine, offer)
    tools = mcp_server.make_server(service)
    return api.create_app(service, access, page=flags.page, tools=tools), engine


def _log_to_stderr() -> None:
    """The server's log and its access log as lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("pixart_jax", logging.INFO), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)

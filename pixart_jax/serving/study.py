"""``python -m pixart_jax evaluate study serve``: a study for raters, their votes in a file."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import tyro
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from pixart_jax import cli
from pixart_jax.errors import UserError
from pixart_jax.evaluation import study
from pixart_jax.files import locked
from pixart_jax.serving.command import Endpoint
from pixart_jax.serving.guard import Access, Guard


@dataclasses.dataclass(frozen=True)
class Flags:
    """Show a study to raters over the network. Each vote is on disk before it is acknowledged; a
    rater goes on under the same name after any interruption. The page is open; votes need the
    key."""

    study: tyro.conf.Positional[Path]
    """the folder of `study build`"""
    votes: Path | None = None
    """where to append the votes, by default STUDY/votes.jsonl"""
    endpoint: tyro.conf.OmitArgPrefixes[Endpoint] = Endpoint()


class Ballot:
    """The votes of a study in an open file; each rater votes once on a trial. Thread-safe."""

    def __init__(self, folder: Path, file: IO[bytes]):
        self._key, self._file, self._lock = study.read_key(folder), file, threading.Lock()
        self._done: dict[str, set[str]] = collections.defaultdict(set)
        self._sheets: dict[str, int] = {}
        path = Path(file.name)
        if text := path.read_bytes():
            file.truncate(text.rfind(b"\n") + 1)  # a line that was cut off was never acknowledged
            for line in text[: text.rfind(b"\n") + 1].splitlines():
                fields = json.loads(line)
                self._done[fields["rater"]].add(fields["trial"])
                self._sheets[fields["rater"]] = fields.get("sheet", 0)

    def enter(self, rater: str) -> dict[str, Any]:
        """The rater's sheet, the least taken one for a new rater, and the trials that are done."""
        _check_name(rater)
        with self._lock:
            if rater not in self._sheets:
                taken = collections.Counter(self._sheets.values())
                self._sheets[rater] = min(range(self._key["sheets"]), key=lambda n: taken[n])
            return {"sheet": self._sheets[rater], "done": sorted(self._done[rater])}

    def cast(self, fields: Any) -> None:
        """Append a vote as the page sends it. Raises UserError for one that is not of this study;
        one that is there already changes nothing."""
        if not isinstance(fields, dict):
            raise UserError("a vote is a JSON object")
        if fields.get("version") != self._key["version"]:
            raise UserError("the page is of another study: reload it")
        sent = {name: fields.get(name) for name in ("trial", "rater", "left", "answer", "ms")}
        sent["version"], sheet = fields["version"], fields.get("sheet")
        if not isinstance(sheet, int) or sheet not in range(self._key["sheets"]):
            raise UserError(f"sheet {str(sheet)[:20]!r} is not of this study")
        _check_name(sent["rater"])
        if not isinstance(sent["ms"], int | float) or not 0 <= sent["ms"] < math.inf:
            raise UserError("ms: milliseconds are needed")
        vote = study.resolve(sent, self._key)
        with self._lock:
            if vote.trial in self._done[vote.rater]:
                return
            line = {k: v for k, v in dataclasses.asdict(vote).items() if v != ""} | {"sheet": sheet}
            self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self._done[vote.rater].add(vote.trial)
            self._sheets.setdefault(vote.rater, sheet)


def _check_name(rater: Any) -> None:
    if not isinstance(rater, str) or not 0 < len(rater) <= 64 or not rater.isprintable():
        raise UserError("rater: a name of 1 to 64 characters is needed")


def create_app(folder: Path, ballot: Ballot, access: Access):
    """The ASGI app: the page, and /v1/votes behind the key."""

    async def entered(request: Request) -> JSONResponse:
        return JSONResponse(ballot.enter(request.query_params.get("rater", "")))

    async def cast(request: Request) -> JSONResponse:
        try:
            fields = await request.json()
        except ValueError:
            raise UserError("the body is not JSON") from None
        await run_in_threadpool(ballot.cast, fields)
        return JSONResponse({})

    routes = [
        Route("/v1/votes", entered, methods=["GET"]),
        Route("/v1/votes", cast, methods=["POST"]),
        Mount("/", StaticFiles(directory=folder / study.PAGE, html=True)),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, access=access)])


def main(argv: Sequence[str]) -> int:
    prog = "python -m pixart_jax evaluate study serve"
    flags = cli.parse(Flags, argv, prog=prog)
    access = flags.endpoint.access()
    study.read_key(flags.study)
    path = flags.votes or flags.study / "votes.jsonl"
    with locked(path, busy=UserError(f"another server writes {path}")) as file:
        ballot = Ballot(flags.study, file)
        listening, where = flags.endpoint.listen()
        print(f"study at {where}, votes in {path}; Ctrl-C ends", flush=True)
        app = create_app(flags.study, ballot, access)
        config = uvicorn.Config(app, access_log=False, log_config=None, server_header=False)
        uvicorn.Server(config).run(sockets=[listening])
    return 0

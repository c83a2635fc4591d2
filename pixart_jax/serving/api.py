"""The HTTP API: OpenAI's images endpoints with extension fields, models, health, metrics, the page.

``POST /v1/images/generations`` (JSON) and ``/v1/images/edits`` (multipart; parts image, mask whose
alpha 0 marks what is made anew, control) take OpenAI's fields, and negative_prompt,
num_inference_steps, guidance_scale, seed (a number or its digits; image k has seed + k), solver,
lora [{name, weight}], progress; edits also strength, control_scale, control_from ("canny": the
control is a picture). Each image of an answer has, beside b64_json or url: index, seed, parameters
(as in its PNG), prompt_truncated (the words beyond the model's limit, or null).

With ``stream`` the answer is server-sent events: ``image_generation.partial_image`` and
``.completed`` (edits: ``image_edit.…``), with image_index; with ``progress`` also
``image_generation.progress`` {state: queued | compiling | running, position, step, steps};
``error`` {error} at an end that failed; ``data: [DONE]``.

``GET /v1/models`` → each model has, beside OpenAI's fields: sizes (list of "WIDTHxHEIGHT"),
default_size, steps (list), solvers [{name, steps, guidance}] (its defaults; the first is the
model's), strengths, max_n, max_prompt_chars, max_prompt_tokens, adapters, controlnets (names).
``POST /v1/tokens`` {prompt} → {count, limit, lost (words beyond the limit)}. ``GET /healthz``;
``/readyz`` → {state: loading | compiling | ready | draining}, 503 until ready.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationError
from starlette.exceptions import HTTPException

from pixart_jax.images import image_bytes
from pixart_jax.serving import uploads
from pixart_jax.serving.engine import Done, Engine, Event, Failed, Job, Preview, Progress
from pixart_jax.serving.errors import ApiError, as_api_error
from pixart_jax.serving.guard import FORM_LIMIT, Access, Guard
from pixart_jax.serving.metrics import Metrics
from pixart_jax.serving.offer import Generation, Offer
from pixart_jax.serving.results import ImageStore

KEEP_ALIVE = 15.0  # seconds without an event
STATIC = Path(__file__).with_name("static")


def _number(value: Any) -> Any:
    """As in JSON Schema: 1.0 is an integer, "1" and true are not."""
    if isinstance(value, bool | str):
        raise ValueError("a number is needed")
    return value


_Whole = BeforeValidator(_number)  # after Field, or the document loses its bounds


class LoraWeight(BaseModel):
    """An adapter of this server."""

    model_config = ConfigDict(extra="forbid")
    name: str
    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False), _Whole] = 1.0


class ImageRequest(BaseModel):
    """A request for images. quality, style, moderation, user and safety_identifier are accepted
    and have no effect."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1)
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10), _Whole] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100), _Whole] | None = None
    stream: StrictBool | None = None
    partial_images: Annotated[int, Field(ge=0, le=3), _Whole] | None = None
    quality: str | None = None
    style: str | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    negative_prompt: str | None = None
    num_inference_steps: Annotated[int, _Whole] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False), _Whole] | None = None
    seed: (
        Annotated[int, Field(ge=0, lt=2**64), _Whole]
        | Annotated[
            str, Field(max_length=20, json_schema_extra={"pattern": "^[0-9]{1,19}$"})
        ]  # the offer checks it
        | None
    ) = None
    solver: str | None = None
    lora: list[LoraWeight] | None = Field(None, max_length=8)
    progress: StrictBool | None = None


class EditRequest(ImageRequest):
    """The text parts of an edit; image, mask and control are files."""

    input_fidelity: Literal["high", "low"] | None = None
    strength: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), _Whole] | None = None
    control_scale: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False), _Whole] | None = None
    control_from: Literal["canny"] | None = None


class TokensRequest(BaseModel):
    """A prompt to count the tokens of."""

    model_config = ConfigDict(extra="forbid")
    prompt: str


class ErrorDetail(BaseModel):
    """type: OpenAI's; param: the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every answer from 400 on."""

    error: ErrorDetail


class ImagesResponse(BaseModel):
    """OpenAI's, with extensions in each image."""

    created: int
    data: list[dict[str, Any]]
    background: str
    output_format: str
    size: str
    usage: dict[str, Any]


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse}
    for status in (400, 401, 403, 404, 413, 415, 421, 422, 429, 500, 503)
}


_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "object"}}}}
}
_FIELDS = (
    *("negative_prompt", "size", "n", "num_inference_steps", "guidance_scale", "solver", "seed"),
    *("strength", "control_scale"),
)


class ClientGone(Exception):
    """Nobody reads the answer."""


class Service:
    """What the routes and the tools for agents call: an engine, its offer, results and figures."""

    def __init__(self, engine: Engine, offer: Offer):
        self.engine, self.offer, self.metrics = engine, offer, Metrics(engine)
        self.images = ImageStore()
        self.created = int(time.time())

    def submit(
        self,
        generation: Generation,
        previews: int = 0,
        progress: bool = False,
        request: Request | None = None,
    ) -> tuple[Job, AsyncGenerator[Event | None]]:
        """Queue a request; (its job, its events, and None every KEEP_ALIVE seconds). The end of the
        iterator cancels the request. Raises as Engine.submit; the iterator raises where it fails,
        and ClientGone where the client of ``request`` closes the connection."""
        loop, found = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(found.put_nowait, event)

        async def watch(request: Request) -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            found.put_nowait(Failed(ClientGone()))

        job = self.engine.submit(generation, listen, previews, progress)

        async def events() -> AsyncGenerator[Event | None]:
            watching = request and asyncio.ensure_future(watch(request))
            left = generation.count
            try:
                while left:
                    try:
                        event = await asyncio.wait_for(found.get(), KEEP_ALIVE)
                    except TimeoutError:
                        yield None
                        continue
                    if isinstance(event, Failed):
                        raise event.error
                    left -= isinstance(event, Done)
                    yield event
            finally:
                self.engine.cancel(job)
                if watching:
                    watching.cancel()

        return job, events()

    async def file(
        self, generation: Generation, event: Done, kind: str = "png", quality: int = 100
    ) -> tuple[bytes, dict[str, Any]]:
        """(an image as a file, its settings)."""
        settings = self.offer.settings(generation, event.index)
        how: Any = event.pixels, settings, kind, quality
        return await asyncio.to_thread(image_bytes, *how), settings

    def model(self) -> dict[str, Any]:
        own = {"id": self.offer.name, "object": "model", "created": self.created}
        return {**own, "owned_by": "pixart-jax", **self.offer.describe()}


@dataclasses.dataclass
class _Answer:
    """How one request's images are answered."""

    service: Service
    body: ImageRequest
    generation: Generation
    base_url: str

    def __post_init__(self) -> None:
        body, generation, service = self.body, self.generation, self.service
        self.kind = body.output_format or "png"
        self.quality = 100 if body.output_compression is None else body.output_compression
        tokens, lost = service.offer.tokens(generation.prompt)
        self.lost = " ".join(lost)[:500] or None
        images = service.offer.latent_tokens(generation)
        self.about = {"background": "opaque", "output_format": self.kind}
        self.about |= {"size": f"{generation.width}x{generation.height}", "quality": "auto"}
        texts = {"text_tokens": tokens, "image_tokens": images * (generation.image is not None)}
        inputs, outputs = sum(texts.values()), images * generation.count
        self.usage = {"input_tokens": inputs, "input_tokens_details": texts}
        self.usage |= {"output_tokens": outputs, "total_tokens": inputs + outputs}

    async def image(self, event: Done) -> dict[str, Any]:
        """One of ``data``."""
        how = self.generation, event, self.kind, self.quality
        data, settings = await self.service.file(*how)
        found: dict[str, Any] = {"index": event.index, "seed": settings["seed"]}
        found |= {"parameters": settings, "prompt_truncated": self.lost}
        if self.body.response_format == "url":
            name = self.service.images.put(data, self.kind)
            return {"url": f"{self.base_url}/images/{name}", **found}
        return {"b64_json": base64.b64encode(data).decode(), **found}

    async def whole(self, events: AsyncGenerator[Event | None]) -> dict[str, Any]:
        made = [asyncio.ensure_future(self.image(e)) async for e in events if isinstance(e, Done)]
        data = sorted(await asyncio.gather(*made), key=lambda one: one["index"])
        return {"created": int(time.time()), "data": data, **self.about, "usage": self.usage}

    async def stream(
        self, events: AsyncGenerator[Event | None], prefix: str, facts: dict[str, Any]
    ) -> AsyncIterator[str]:
        """Server-sent events. facts: of the access log."""
        try:
            async for event in events:
                if event is None:
                    yield ": keep-alive\n\n"
                elif isinstance(event, Progress):
                    yield _sse(f"{prefix}.progress", dataclasses.asdict(event))
                elif isinstance(event, Preview):
                    pixels = await asyncio.to_thread(image_bytes, event.pixels, None, self.kind, 90)
                    found: dict[str, Any] = {"partial_image_index": event.number}
                    found |= {"image_index": event.index, **self.about}
                    found |= {"b64_json": base64.b64encode(pixels).decode()}
                    yield _sse(f"{prefix}.partial_image", found, created_at=int(time.time()))
                elif isinstance(event, Done):
                    found = await self.image(event)
                    found |= {"image_index": event.index, "created_at": int(time.time())}
                    yield _sse(f"{prefix}.completed", found, **self.about, usage=self.usage)
        except ClientGone:
            facts["status"] = 499
        except Exception as error:
            found = as_api_error(error, facts["id"]).body
            facts["error"] = found["error"]["code"]
            yield _sse("error", found)
        finally:
            await events.aclose()
        yield "data: [DONE]\n\n"


def _sse(kind: str, facts: dict[str, Any], **more: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts, **more})}\n\n"


class _Stream(StreamingResponse):
    """Ends by its events alone: they end when the client closes the connection."""

    async def listen_for_disconnect(self, receive: Any) -> None:
        await asyncio.Event().wait()


async def _answer(
    service: Service, request: Request, body: ImageRequest, pictures: dict[str, Any]
) -> Response:
    if body.model not in (None, service.offer.name):
        known = service.offer.name
        raise ApiError(
            404, f"no model {body.model[:80]!r}: {known!r} is served", "model_not_found", "model"
        )
    given = {name: getattr(body, name, None) for name in _FIELDS}
    fields: dict[str, Any] = {name: v for name, v in given.items() if v is not None} | pictures
    lora = [(one.name, one.weight) for one in body.lora or ()]
    generation = service.offer.generation(body.prompt, lora=lora, **fields)
    scope = request.scope
    answer = _Answer(service, body, generation, f"{scope['scheme']}://{request.headers['host']}")
    facts = scope["facts"]
    facts |= {"n": generation.count, "size": answer.about["size"], "steps": generation.steps}
    previews = (body.partial_images or 0) if body.stream else 0
    progress = bool(body.stream and body.progress)
    facts["job"], events = service.submit(generation, previews, progress, request)
    if body.stream:
        prefix = "image_edit" if isinstance(body, EditRequest) else "image_generation"
        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
        lines = answer.stream(events, prefix, facts)
        return _Stream(lines, media_type="text/event-stream", headers=headers)
    try:
        return JSONResponse(await answer.whole(events))
    except ClientGone:
        return Response(status_code=499)
    finally:
        await events.aclose()


def create_app(
    service: Service, access: Access | None = None, *, page: bool = True, tools: Any = None
) -> FastAPI:
    """The ASGI app. tools: an MCPServer for /mcp."""
    mcp = tools and tools.streamable_http_app(
        stateless_http=True,
        # the Guard has checked host and origin
        transport_security=TransportSecuritySettings(enable_dns_rebinding_protection=False),
        max_request_body_size=FORM_LIMIT,
    )

    @contextlib.asynccontextmanager
    async def life(app: FastAPI):
        service.engine.start()
        async with tools.session_manager.run() if tools else contextlib.nullcontext():
            yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(
        title="pixart_jax", docs_url=None, redoc_url=None, lifespan=life, responses=_ERRORS
    )
    app.add_middleware(Guard, access=access or Access(), metrics=service.metrics)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = _as_bad_field(error.errors())
        return JSONResponse(found.body, 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        found = error.__cause__
        if not isinstance(found, ApiError):
            found = ApiError(error.status_code, str(error.detail))
        return JSONResponse(found.body, found.status, error.headers)

    @app.post("/v1/images/generations", response_model=ImagesResponse, responses=_EVENTS)
    async def generations(request: Request, body: ImageRequest):
        return await _answer(service, request, body, {})

    @app.post(
        "/v1/images/edits",
        response_model=ImagesResponse,
        responses=_EVENTS,
        openapi_extra={"requestBody": uploads.BODY},
    )
    async def edits(request: Request):
        texts, files = await uploads.read_form(request)
        try:
            body = EditRequest(**uploads.parsed(texts))
        except ValidationError as error:
            raise _as_bad_field(error.errors()) from None
        pictures = await asyncio.to_thread(uploads.pictures, files, body.control_from)
        return await _answer(service, request, body, pictures)

    @app.api_route("/v1/images/variations", methods=["POST"], include_in_schema=False)
    async def variations():
        raise ApiError(404, "variations are not made: /v1/images/edits takes an image")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.offer.name:
            raise ApiError(404, f"no model {name[:80]!r}", "model_not_found", "model")
        return service.model()

    @app.post("/v1/tokens")
    async def tokens(body: TokensRequest) -> dict[str, Any]:
        service.offer.check_text("prompt", body.prompt)
        count, lost = await asyncio.to_thread(service.offer.tokens, body.prompt)
        limit = service.offer.model.transformer.text_tokens
        return {"count": count, "limit": limit, "lost": lost}

    @app.get("/images/{name}", include_in_schema=False)
    async def image(name: str) -> Response:
        if (found := service.images.get(name)) is None:
            raise ApiError(404, "no such image: each is kept for an hour")
        data, kind = found
        headers = {"Content-Disposition": f'inline; filename="{name}"'}
        return Response(data, media_type=f"image/{kind}", headers=headers)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/healthz")
    @app.get("/health", include_in_schema=False)
    async def healthz() -> JSONResponse:
        alive = service.engine.alive
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        state = service.engine.state
        return JSONResponse({"state": state}, 200 if state == "ready" else 503)

    if mcp is not None:
        app.router.routes.extend(mcp.routes)
    if page and STATIC.is_dir():
        # not a route: a wrong method on another path stays a 405
        app.router.default = StaticFiles(directory=STATIC, html=True)
    _document(app, service.offer)
    return app


def _as_bad_field(errors: Any) -> ApiError:
    """The first of pydantic's errors."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON")
    field = where[0] if where else None
    message = f"{'.'.join(where[:3])[:100] or 'body'}: {first['msg'][:200]}"
    return ApiError(400, message, "invalid_value", field and field[:100])


def _document(app: FastAPI, offer: Offer) -> None:
    """Name in the OpenAPI document what is offered."""
    document, about = app.openapi(), offer.describe()
    fields = document["components"]["schemas"]["ImageRequest"]["properties"]
    offered = {
        "model": [offer.name],
        "size": ["auto", *about["sizes"]],
        "num_inference_steps": about["steps"],
        "solver": [one["name"] for one in about["solvers"]],
    }
    for name, values in offered.items():
        for option in fields[name]["anyOf"]:
            if option["type"] != "null":
                option["enum"] = values
    document["components"]["schemas"]["LoraWeight"]["properties"]["name"]["enum"] = about[
        "adapters"
    ]
    if not about["adapters"]:
        fields["lora"]["anyOf"][0]["maxItems"] = 0
    fields["n"]["anyOf"][0]["maximum"] = about["max_n"]
    fields["prompt"]["maxLength"] = about["max_prompt_chars"]
    app.openapi_schema = document

"""Tools for agents over the Model Context Protocol: at /mcp of a server, and over stdio as
``python -m pixart_jax mcp`` with an engine of its own or, with --connect, a server's.

A result holds a small preview, which a model can look at, a link to the whole image, and the
settings that make it again. stdout belongs to the protocol.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.server import MCPServer, Server
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceError, ToolError
from mcp.server.stdio import stdio_server
from mcp.shared._httpx_utils import create_mcp_http_client
from mcp.types import CallToolResult, ImageContent, ResourceLink, TextContent, ToolAnnotations
from PIL import Image
from pydantic import BaseModel, Field

from pixart_jax import cli
from pixart_jax.errors import Notice, UserError
from pixart_jax.serving import uploads
from pixart_jax.serving.api import Service
from pixart_jax.serving.engine import Done, Progress
from pixart_jax.serving.errors import as_api_error
from pixart_jax.serving.opening import EngineFlags

PREVIEW = 512  # px of a preview's longer side; clients cut results of 1 MB
INSTRUCTIONS = (
    "Generates images from text with a PixArt model. describe_parameters lists the sizes, steps "
    "and solvers that may be asked for. Repeat a call with the seed of a result to make the same "
    "image again."
)


class Generated(BaseModel):
    """What was made: names of the images, and the settings of each."""

    names: list[str]
    seeds: list[str]
    parameters: list[dict[str, Any]]
    paths: list[str] = Field(default_factory=list, description="of files on this machine")
    prompt_truncated: str | None = Field(None, description="words beyond the model's limit")


_READ = ToolAnnotations(read_only_hint=True, open_world_hint=False)
_MAKE = ToolAnnotations(
    read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False
)
_Prompt = Annotated[str, Field(description="what the image shows", min_length=1)]
_Picture = Annotated[str | None, Field(description="the name of a result, or a data: URL")]
_Size = Annotated[str, Field(description="WIDTHxHEIGHT, or auto")]
_Seed = Annotated[str | int | None, Field(description="the same seed gives the same image")]


def make_server(service: Service, folder: Path | None = None) -> MCPServer:
    """The tools. folder: whole images are also written to it."""
    server = MCPServer("pixart-jax", instructions=INSTRUCTIONS, log_level="WARNING")

    async def make(ctx: Context, prompt: str, **fields: Any) -> CallToolResult:
        given = {name: value for name, value in fields.items() if value is not None}
        try:
            generation = service.offer.generation(prompt, **given)
            _, events = service.submit(generation, progress=True)
            done = []
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, Progress):
                        await ctx.report_progress(event.step, event.steps, event.state)
                    elif isinstance(event, Done):
                        done.append(event)
        except Exception as error:
            raise ToolError(str(as_api_error(error))) from None
        content: list[Any] = []
        lost = " ".join(service.offer.tokens(prompt)[1])[:500] or None
        found = Generated(names=[], seeds=[], parameters=[], paths=[], prompt_truncated=lost)
        for event in sorted(done, key=lambda one: one.index):
            data, settings = await service.file(generation, event)
            name = service.images.put(data, "png")
            preview = await asyncio.to_thread(_preview, event.pixels)
            content.append(ImageContent(type="image", data=preview, mime_type="image/webp"))
            link: Any = {"uri": _address(ctx, name), "name": name, "size": len(data)}
            content.append(ResourceLink(type="resource_link", mime_type="image/png", **link))
            found.names.append(name)
            found.seeds.append(str(settings["seed"]))
            found.parameters.append(settings)
            if folder is not None:
                path = folder / name
                await asyncio.to_thread(path.write_bytes, data)
                found.paths.append(str(path.resolve()))
        facts = found.model_dump_json(exclude_none=True, exclude_defaults=True)
        content.append(TextContent(type="text", text=facts))
        return CallToolResult(content=content, structured_content=found.model_dump())

    @server.tool(title="Generate images", annotations=_MAKE)
    async def generate_image(
        ctx: Context,
        prompt: _Prompt,
        negative_prompt: str = "",
        size: _Size = "auto",
        n: int = 1,
        seed: _Seed = None,
        steps: int | None = None,
        guidance: float | None = None,
        solver: str | None = None,
        lora: dict[str, float] | None = None,
    ) -> Annotated[CallToolResult, Generated]:
        """Generate images of a prompt."""
        fields = {"negative_prompt": negative_prompt, "size": size, "n": n, "seed": seed}
        fields |= {"num_inference_steps": steps, "guidance_scale": guidance, "solver": solver}
        return await make(ctx, prompt, **fields, lora=list((lora or {}).items()))

    @server.tool(title="Edit an image", annotations=_MAKE)
    async def edit_image(
        ctx: Context,
        prompt: _Prompt,
        image: _Picture = None,
        mask: Annotated[str | None, Field(description="a PNG; alpha 0 is made anew")] = None,
        control: Annotated[_Picture, Field(description="whose edges the result follows")] = None,
        strength: Annotated[float | None, Field(description="share of the steps, to 1")] = None,
        negative_prompt: str = "",
        seed: _Seed = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Annotated[CallToolResult, Generated]:
        """Change an image, or, with a mask, a part of it; or follow the edges of another."""
        given = {"image": image, "mask": mask, "control": control}
        try:
            files = {name: _bytes(service, one) for name, one in given.items() if one is not None}
            pictures = await asyncio.to_thread(uploads.pictures, files, "canny")
        except Exception as error:
            raise ToolError(str(as_api_error(error))) from None
        fields = {"negative_prompt": negative_prompt, "seed": seed, "strength": strength}
        fields |= {"num_inference_steps": steps, "guidance_scale": guidance}
        return await make(ctx, prompt, **fields, **pictures)

    @server.tool(title="List models", annotations=_READ)
    async def list_models() -> dict[str, Any]:
        """The model that is served, and the engine's state."""
        return {"models": [service.offer.name], "state": service.engine.state}

    @server.tool(title="Describe parameters", annotations=_READ)
    async def describe_parameters() -> dict[str, Any]:
        """Sizes, steps, solvers with their defaults, adapters and limits."""
        return service.offer.describe()

    @server.resource("image://{name}", mime_type="image/png")
    async def image(name: str) -> bytes:
        if (found := service.images.get(name)) is None:
            raise ResourceError("no such image: each is kept for an hour")
        return found[0]

    return server


def _address(ctx: Context, name: str) -> str:
    """Of a whole image: an http URL where the call came by HTTP."""
    request = getattr(ctx.request_context, "request", None)
    if request is None:
        return f"image://{name}"
    return f"{request.scope['scheme']}://{request.headers['host']}/images/{name}"


def _bytes(service: Service, text: str) -> bytes:
    """Of a picture: a data: URL, or the name of an earlier result; never a path or an address."""
    head, comma, data = text.partition(",")
    try:
        if comma and head.startswith("data:image/") and head.endswith(";base64"):
            return base64.b64decode(data, validate=True)
    except ValueError:
        raise UserError("the data: URL is not base64") from None
    if (found := service.images.get(text.rpartition("/")[2])) is None:
        raise UserError("an image is the name of a result of the last hour, or a data: URL")
    return found[0]


def _preview(pixels: Any) -> str:
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((PREVIEW, PREVIEW))
    picture.save(file, "webp", quality=80)
    return base64.b64encode(file.getvalue()).decode()


# ---- the command ----


@dataclasses.dataclass(frozen=True)
class Flags:
    """Tools for agents over stdio (MCP)."""

    engine: tyro.conf.OmitArgPrefixes[EngineFlags] = EngineFlags()
    connect: str | None = None
    """The address of a running server, such as http://127.0.0.1:8000: use its model and device. Its
    key is in $PIXART_API_KEY."""
    out: Path | None = None
    """A folder for the images; by default they stay in memory for an hour."""


def main(argv: Sequence[str]) -> int:
    """Answers at once; the model is opened meanwhile."""
    flags = cli.parse(Flags, argv, prog="python -m pixart_jax mcp")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    warnings.simplefilter("ignore", Notice)
    if flags.connect is not None:
        if not flags.connect.startswith(("http://", "https://")):
            raise UserError(f"--connect {flags.connect}: an http address is needed")
        asyncio.run(_forward(flags.connect.rstrip("/")))
        return 0
    if flags.out is not None:
        flags.out.mkdir(parents=True, exist_ok=True)
    engine, offer = flags.engine.build()
    # a print of a library is flushed while stdout is diverted, not onto the wire at the end
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    engine.start()
    make_server(Service(engine, offer), folder=flags.out).run()
    engine.close(timeout=30)
    return 0


async def _forward(address: str) -> None:
    """Pass requests on to a server's /mcp, and its answers and progress back."""
    key = os.environ.get("PIXART_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(create_mcp_http_client(headers))
        try:
            there = await stack.enter_async_context(
                Client(streamable_http_client(f"{address}/mcp", http_client=http))
            )
        except Exception as error:
            raise UserError(f"--connect {address}: no server answers there ({error})") from None

        here: Any = Server(
            "pixart-jax",
            instructions=INSTRUCTIONS,
            on_list_tools=lambda ctx, params: there.list_tools(),
            on_call_tool=lambda ctx, params: there.call_tool(
                params.name, params.arguments, progress_callback=ctx.session.report_progress
            ),
            on_read_resource=lambda ctx, params: there.read_resource(params.uri),
            on_list_resource_templates=lambda ctx, params: there.list_resource_templates(),
        )
        async with stdio_server() as (reading, writing):
            await here.run(reading, writing, here.create_initialization_options())

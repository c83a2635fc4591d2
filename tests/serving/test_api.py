"""The HTTP API over a stub engine: answers, streams, errors; the official openai and mcp
clients."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import struct
import threading
import time
import zlib

import anyio
import httpx
import numpy as np
import openai
import pytest
from mcp import Client
from PIL import Image

from pixart_jax.serving import api, mcp_server, results
from pixart_jax.serving.guard import Access
from tests.serving.servers import StubRenderer, in_process, listening, png, stub_service

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def stub():
    """(client, Service, renderer) of one server for all tests."""
    service, renderer = stub_service()
    app = api.create_app(service, tools=mcp_server.make_server(service))
    with listening(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        yield client, service, renderer


@pytest.fixture(scope="module")
def client(stub):
    return stub[0]


def bomb(side: int) -> bytes:
    """A PNG whose header declares side × side pixels."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    ihdr = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + ihdr + png()[33:]


def pixels_of(one: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))))


def events_of(lines) -> list[tuple[str, dict]]:
    found, kind = [], ""
    for line in lines:
        if line.startswith("event: "):
            kind = line[7:]
        elif line.startswith("data: {"):
            found.append((kind, json.loads(line[6:])))
    return found


# ---- answers ----


def test_an_answer_has_openais_fields_and_what_makes_the_image_again(client):
    body = {"prompt": "a red circle", "n": 2, "seed": str(2**64 - 1), "quality": "high"}
    answer = client.post(GENERATE, json=body, headers={"x-request-id": "mine-1"})
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "mine-1"
    found = answer.json()
    assert found["size"] == "64x64" and found["output_format"] == "png"
    usage = found["usage"]
    assert usage["output_tokens"] == 2 * 16 and usage["total_tokens"] == usage["input_tokens"] + 32
    assert [one["seed"] for one in found["data"]] == [str(2**64 - 1), 0]
    assert [one["index"] for one in found["data"]] == [0, 1]
    assert (pixels_of(found["data"][1]) == 0).all()
    first = Image.open(io.BytesIO(base64.b64decode(found["data"][0]["b64_json"])))
    assert json.loads(first.info["pixart_jax"]) == found["data"][0]["parameters"]
    assert "Steps: 20" in first.info["parameters"]
    again = client.post(GENERATE, json=body).json()
    assert [one["b64_json"] for one in again["data"]] == [one["b64_json"] for one in found["data"]]


def test_formats_urls_and_truncated_prompts(client):
    long = "a " * 70
    for kind in ("jpeg", "webp"):
        body = {"prompt": long, "output_format": kind, "output_compression": 80, "seed": 3}
        (one,) = client.post(GENERATE, json=body).json()["data"]
        picture = Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))
        assert picture.format == kind.upper() and one["prompt_truncated"] == "a a a a a a a"
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert "Seed: 3" in comment[8:].decode("utf-16-be")
    (one,) = client.post(GENERATE, json={"prompt": "a", "response_format": "url"}).json()["data"]
    answer = client.get(one["url"])
    assert answer.headers["content-type"] == "image/png" and answer.content[:4] == b"\x89PNG"
    assert answer.headers["content-disposition"].startswith("inline; filename=")
    assert client.get(f"/images/{0:032}.png").status_code == 404
    assert client.get("/images/..%2f..%2fetc%2fpasswd").status_code == 404


def test_images_are_kept_for_an_hour_and_to_a_limit(monkeypatch):
    store = results.ImageStore()
    monkeypatch.setattr(results, "MAX_BYTES", 10)
    first, second, third = (store.put(bytes(4), "png") for _ in range(3))
    assert store.get(first) is None and store.get(second) == (bytes(4), "png")
    for name in (f"../{third}", f"{third}/", third.upper(), f"{third}\n", "passwd"):
        assert store.get(name) is None
    monkeypatch.setattr(results, "MAX_AGE", -1)
    assert store.get(third) is None


def test_models_tokens_and_health(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "shapes" and model["sizes"] == ["64x64", "96x64", "64x96", "96x96"]
    assert model["default_size"] == "64x64" and 20 in model["steps"]
    assert model["solvers"][0] == {"name": "dpm++", "steps": 20, "guidance": 2.0}
    assert model["max_n"] == 10 and model["max_prompt_tokens"] == 64
    assert model["adapters"] == ["heart"] and model["controlnets"] == []
    assert client.get("/v1/models/shapes").json() == model
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    counted = client.post("/v1/tokens", json={"prompt": "a " * 70}).json()
    assert counted == {"count": 71, "limit": 64, "lost": ["a"] * 7}
    assert client.get("/healthz").status_code == client.get("/health").status_code == 200
    assert client.get("/readyz").json() == {"state": "ready"}
    client.post(GENERATE, json={"prompt": "a"})
    text = client.get("/metrics").text
    assert 'pixart_requests_total{route="/v1/images/generations",status="200"}' in text
    assert "pixart_batch_fill_ratio_count" in text and "a red circle" not in text


def test_a_stream_shows_progress_partial_images_and_the_end(client):
    body = {"prompt": "a", "n": 2, "stream": True, "partial_images": 2, "progress": True}
    with client.stream("POST", GENERATE, json={**body, "num_inference_steps": 4}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = list(answer.iter_lines())
    assert lines[-2] == "data: [DONE]"
    events = events_of(lines)
    kinds = [kind.removeprefix("image_generation.") for kind, _ in events]
    assert kinds.count("partial_image") == 4 and kinds.count("completed") == 2
    assert kinds[0] == "progress" and events[0][1]["state"] == "queued"
    assert {data["image_index"] for kind, data in events if "completed" in kind} == {0, 1}
    assert all(kind == data["type"] for kind, data in events)
    plain = {"prompt": "infinite", "stream": True}
    with client.stream("POST", GENERATE, json=plain) as answer:
        (event,) = events_of(answer.iter_lines())
    assert event[0] == "error" and "not finite" in event[1]["error"]["message"]


def test_edits_take_an_image_a_mask_and_their_fields_as_text(client, stub):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    file = io.BytesIO()
    mask.save(file, "png")
    files = {"image": ("a.png", png()), "mask": ("m.png", file.getvalue())}
    data = {"prompt": "a", "strength": "0.5", "seed": "5", "n": "2", "guidance_scale": "3"}
    answer = client.post(EDIT, data=data, files=files)
    assert answer.status_code == 200, answer.text
    generation = stub[2].batches[-1][0][0]
    assert generation.mask[:, :32].all() and not generation.mask[:, 32:].any()
    assert generation.strength == 0.5 and generation.seed == 5 and generation.count == 2
    assert answer.json()["data"][0]["parameters"]["edit"] == "inpaint"
    assert client.post(EDIT, data=data, files=[("image[]", ("a.png", png()))]).status_code == 200


# ---- errors ----

BAD = [
    ({"prompt": ""}, 400, "prompt"),
    ({}, 400, "prompt"),
    ({"prompt": "x" * 4001}, 400, "prompt"),
    ({"prompt": "a", "model": "gpt-image-2"}, 404, "model"),
    ({"prompt": "a", "n": 11}, 400, "n"),
    ({"prompt": "a", "n": "2"}, 400, "n"),
    ({"prompt": "a", "n": True}, 400, "n"),
    ({"prompt": "a", "size": "1024x1024"}, 400, "size"),
    ({"prompt": "a", "seed": 1.5}, 400, "seed"),
    ({"prompt": "a", "background": "transparent"}, 400, "background"),
    ({"prompt": "a", "output_format": "svg"}, 400, "output_format"),
    ({"prompt": "a", "partial_images": 4}, 400, "partial_images"),
    ({"prompt": "a", "guidence_scale": 3}, 400, "guidence_scale"),
    ({"prompt": "a", "lora": [{"name": "x"}]}, 400, "lora"),
    ([], 400, None),
]


@pytest.mark.parametrize("body, status, param", BAD)
def test_bad_fields_are_named_in_openais_form(client, body, status, param):
    answer = client.post(GENERATE, json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and error["param"] == param
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


def test_bad_uploads_are_named(client):
    mask = png(mode="RGB")
    cases = {
        "image": [b"", b"GIF89a", png()[:60], bomb(30_000), b"<svg/>"],
        "mask": [mask, png(size=(32, 32), mode="RGBA", color=(0, 0, 0, 0))],
    }
    for name, contents in cases.items():
        for content in contents:
            files = {"image": ("a", png()), name: ("b", content)}
            answer = client.post(EDIT, data={"prompt": "a"}, files=files)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, name), answer.text
    for fields in ({"strength": "0.33"}, {"strength": "x"}, {"n": "1e9"}, {"markup": "x"}):
        answer = client.post(EDIT, data={"prompt": "a", **fields}, files={"image": ("a", png())})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == [*fields][0]
    two = [("image", ("a", png())), ("image[]", ("b", png()))]
    many = [("image", ("a", png()))] * 5
    for files in (None, {"prompt": ("a", b"b")}, two, many):
        answer = client.post(EDIT, data={"strength": "0.5"}, files=files or {"x": ("a", b"")})
        assert answer.status_code == 400
    fields = {f"x{n}": "" for n in range(41)}
    answer = client.post(EDIT, data=fields, files={"image": ("a", png())})
    assert answer.status_code == 400 and "40" in answer.json()["error"]["message"]


def test_errors_of_transport_have_the_same_form(client, caplog):
    json_type = {"content-type": "application/json"}
    cases = [
        (client.post(GENERATE, content=b"{", headers=json_type), 400),
        (client.post(GENERATE, content=b'{"prompt": "\\ud800"}', headers=json_type), 400),
        (client.post(GENERATE, content=b"{}", headers={"content-type": "text/plain"}), 415),
        (client.post(EDIT, data={"prompt": "a"}), 415),
        (client.post(GENERATE, content=b" " * 2**20 + b" {}", headers=json_type), 413),
        (client.post(GENERATE, content=(b" " * 2**18 for _ in range(5)), headers=json_type), 413),
        (client.get(GENERATE), 405),
        (client.get("/mcp"), 405),
        (client.post("/v1/images/variations", json={}), 404),
        (client.get("/v1/nothing"), 404),
        (client.post(GENERATE, json={"prompt": "explode"}), 500),
    ]
    for answer, status in cases:
        error = answer.json()["error"]
        assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
        assert "secret" not in answer.text and "Traceback" not in answer.text
    assert cases[-1][0].headers["x-request-id"] in caplog.text
    assert error["code"] == "internal_error" and error["type"] == "server_error"


def test_before_its_model_is_open_it_says_so():
    app = api.create_app(stub_service()[0])

    async def calls():
        async with in_process(app) as client:
            return [await client.post(GENERATE, json={"prompt": "a"}), await client.get("/readyz")]

    answer, ready = asyncio.run(calls())
    error = answer.json()["error"]
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
    assert (error["code"], error["type"]) == ("loading", "service_unavailable_error")
    assert ready.status_code == 503 and ready.json() == {"state": "loading"}


def test_a_full_queue_is_429_and_a_client_that_leaves_frees_its_place(stub):
    client, service, renderer = stub
    renderer.gate.clear()
    answers = []

    def post():
        answers.append(httpx.post(str(client.base_url) + GENERATE, json=body, timeout=60))

    body = {"prompt": "a", "n": 8}
    try:
        threads = [threading.Thread(target=post) for _ in range(9)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        limit = time.monotonic() + 10
        while service.engine.waiting < 64 and time.monotonic() < limit:
            time.sleep(0.01)
        full = client.post(GENERATE, json=body)
        assert full.status_code == 429 and 1 <= int(full.headers["retry-after"]) <= 120
        assert full.json()["error"]["code"] == "queue_full"
        assert full.json()["error"]["type"] == "rate_limit_error"
    finally:
        renderer.gate.set()
    for thread in threads:
        thread.join(30)
    assert [answer.status_code for answer in answers] == [200] * 9
    for stream in (False, True):
        renderer.gate.clear()
        with pytest.raises(httpx.ReadTimeout):
            client.post(GENERATE, json={"prompt": "gone", "stream": stream}, timeout=0.3)
        renderer.gate.set()
        limit = time.monotonic() + 10
        while service.engine.running or service.engine.waiting:
            assert time.monotonic() < limit
            time.sleep(0.01)


@pytest.mark.parametrize(
    "prompt, leave_at", [("a", "progress"), ("a", "complete"), ("infinite", "error")]
)
def test_a_stream_ends_cleanly_whenever_its_client_leaves(caplog, prompt, leave_at):
    """Its place is free at once, and no task is left with an exception that nobody reads."""
    service, renderer = stub_service()
    service.engine.start()
    app = api.create_app(service)
    if leave_at == "progress":
        renderer.gate.clear()
    body = {"prompt": prompt, "stream": True, "progress": True}

    async def call():
        left, messages = asyncio.Event(), [json.dumps(body).encode()]

        async def receive():
            if messages:
                return {"type": "http.request", "body": messages.pop()}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            if leave_at.encode() in message.get("body", b""):
                left.set()

        scope = scope_of(GENERATE, b"application/json")
        await asyncio.wait_for(app(scope, receive, send), 10)
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        gc.collect()

    with caplog.at_level("INFO", "pixart_jax.access"):
        asyncio.run(call())
    renderer.gate.set()
    assert service.engine.close(10)
    assert not [one for one in caplog.records if one.name == "asyncio"]
    (line,) = [json.loads(r.message) for r in caplog.records if r.name == "pixart_jax.access"]
    assert line["status"] == (499 if leave_at == "progress" else 200)


def scope_of(path: str, content_type: bytes) -> dict:
    """Of a POST, as uvicorn gives it."""
    headers = [(b"host", b"localhost"), (b"content-type", content_type)]
    found = {"type": "http", "method": "POST", "path": path, "headers": headers, "scheme": "http"}
    return {**found, "query_string": b"", "asgi": {"spec_version": "2.3"}}


def test_an_upload_that_breaks_off_is_no_error(caplog):
    messages = [{"type": "http.request", "body": b"--x\r\n", "more_body": True}]
    messages += [{"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        raise AssertionError(message)

    scope = scope_of(EDIT, b"multipart/form-data; boundary=x")
    with caplog.at_level("INFO", "pixart_jax.access"):
        asyncio.run(api.create_app(stub_service()[0])(scope, receive, send))
    (record,) = [one for one in caplog.records if one.name.startswith("pixart_jax")]
    assert json.loads(record.message)["status"] == 499


# ---- official clients ----


def test_the_openai_client(client):
    ours = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in ours.models.list()] == ["shapes"]
    found = ours.images.generate(
        prompt="a", n=2, size="96x64", extra_body={"seed": 7, "num_inference_steps": 4}
    )
    sizes = [Image.open(io.BytesIO(base64.b64decode(d.b64_json))).size for d in found.data]
    assert sizes == [(96, 64)] * 2 and found.usage.output_tokens == 48
    events = list(ours.images.generate(prompt="a", stream=True, partial_images=2))
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    fields = {"strength": 0.5, "seed": 7}
    for image in (("a.png", png()), [("a.png", png())]):
        edited = ours.images.edit(image=image, prompt="a", extra_body=fields)
        assert edited.data[0].b64_json
    with pytest.raises(openai.BadRequestError) as error:
        ours.images.generate(prompt="a", size="8x8")
    assert error.value.param == "size" and error.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        ours.images.generate(prompt="a", model="dall-e-3")
    with pytest.raises(openai.APIError, match="not finite"):
        list(ours.images.generate(prompt="infinite", stream=True))


async def exercise(agent: Client) -> None:
    """The tools, as an agent calls them."""
    tools = {tool.name for tool in (await agent.list_tools()).tools}
    assert tools == {"generate_image", "edit_image", "list_models", "describe_parameters"}
    steps = []

    async def progress(done, total, message):
        steps.append((done, total, message))

    call = {"prompt": "a", "n": 2, "seed": str(2**63), "steps": 4}
    made = await agent.call_tool("generate_image", call, progress_callback=progress)
    assert not made.is_error and [one.type for one in made.content] == [
        *["image", "resource_link"] * 2,
        "text",
    ]
    assert steps[-1] == (4, 4, "running")
    assert len(made.content[0].data) < 100_000
    found = made.structured_content
    assert found["seeds"] == [str(2**63), str(2**63 + 1)]
    read = await agent.read_resource(f"image://{found['names'][0]}")
    assert base64.b64decode(read.contents[0].blob)[:4] == b"\x89PNG"
    edit = {"prompt": "b", "image": found["names"][0], "strength": 0.5, "seed": 1}
    assert not (await agent.call_tool("edit_image", edit)).is_error
    edit["image"] = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert not (await agent.call_tool("edit_image", edit)).is_error
    for name, bad, message in [
        ("generate_image", {"prompt": "a", "size": "1x1"}, "not offered"),
        ("generate_image", {"prompt": "explode"}, "internal error"),
        ("generate_image", {}, "prompt"),
        ("edit_image", {"prompt": "a"}, "an image to edit is needed"),
        ("edit_image", {"prompt": "a", "control": edit["image"]}, "no ControlNet"),
        ("edit_image", {"prompt": "a", "image": "/etc/passwd"}, "a data: URL"),
        ("edit_image", {"prompt": "a", "image": "http://localhost/x.png"}, "a data: URL"),
    ]:
        answer = await agent.call_tool(name, bad)
        assert answer.is_error and message in answer.content[0].text
        assert "secret" not in answer.content[0].text
    described = (await agent.call_tool("describe_parameters", {})).structured_content
    assert described["sizes"][0] == "64x64"
    models = (await agent.call_tool("list_models", {})).structured_content
    assert models == {"models": ["shapes"], "state": "ready"}


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_agents_over_http(client, mode):
    async def session():
        with anyio.fail_after(30):
            async with Client(f"{client.base_url}/mcp", mode=mode) as agent:
                await exercise(agent)

    anyio.run(session)


def test_a_cancelled_tool_frees_the_engine(stub):
    client, service, renderer = stub
    renderer.gate.clear()

    async def session():
        with anyio.fail_after(30):
            async with Client(f"{client.base_url}/mcp") as agent:
                with anyio.move_on_after(0.3):
                    await agent.call_tool("generate_image", {"prompt": "a"})
                renderer.gate.set()
                while service.engine.running or service.engine.waiting:
                    await anyio.sleep(0.01)

    anyio.run(session)


@pytest.mark.slow
def test_the_openapi_document_holds():
    """schemathesis: whatever the document allows is answered as it says."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    service, _ = stub_service(StubRenderer())
    service.engine.start()
    app = api.create_app(service, Access(hosts=("*",)))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    accepted = schemathesis.checks.CHECKS.get_one("positive_data_acceptance")
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @settings(
            max_examples=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        @given(case=operation.as_strategy())
        def check(case):
            without = [accepted] if case.path == EDIT else []  # random bytes are no picture
            case.call_and_validate(excluded_checks=without)

        check()
    service.engine.close(5)

"""Who may call the HTTP API: keys, Host and Origin, limits; and fuzzed requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random

import pytest

from pixart_jax.serving import api, mcp_server
from pixart_jax.serving.guard import Access
from tests.serving.servers import in_process, png, stub_service

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"


KEYS = {"ann": hashlib.sha256("schlüssel".encode()).digest()}


@pytest.fixture(scope="module")
def guarded():
    service, _ = stub_service()
    service.engine.start()
    access = Access(KEYS, ("pictures.example",), rate=0)
    yield api.create_app(service, access, tools=mcp_server.make_server(service))
    service.engine.close(5)


KEY = {"authorization": b"Bearer schl\xc3\xbcssel"}
FORM = {"content-type": "multipart/form-data; boundary=x"}
JSON_BODY = {"content": b'{"prompt": "a"}', "headers": {"content-type": "application/json"}}


@pytest.mark.parametrize(
    "path, headers, status, code",
    [
        (GENERATE, {}, 401, "invalid_api_key"),
        (GENERATE, {"authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        (GENERATE, {"authorization": "Bearer schlüßel".encode()}, 401, "invalid_api_key"),
        (GENERATE, {"authorization": "Basic schlussel"}, 401, "invalid_api_key"),
        ("/mcp", {}, 401, "invalid_api_key"),
        ("/metrics", {}, 401, "invalid_api_key"),
        ("/openapi.json", {}, 401, "invalid_api_key"),
        ("/images/x.png", {}, 401, "invalid_api_key"),
        ("/v1/models", {}, 401, "invalid_api_key"),
        ("/v1/models", KEY, 200, None),
        ("/healthz", {"host": "10.0.0.7:80"}, 200, None),
        ("/v1/models", {**KEY, "host": "evil.example"}, 421, "host_not_allowed"),
        ("/v1/models", {**KEY, "host": "localhost.evil.example"}, 421, "host_not_allowed"),
        ("/", {"host": "evil.example"}, 421, "host_not_allowed"),
        ("/v1/models", {**KEY, "host": "pictures.example"}, 200, None),
        ("/v1/models", {**KEY, "host": "[::1]:8000"}, 200, None),
        (GENERATE, {**KEY, "origin": "http://localhost"}, 200, None),
        (GENERATE, {**KEY, "origin": "http://evil.example"}, 403, "origin_not_allowed"),
        (GENERATE, {**KEY, "origin": "null"}, 403, "origin_not_allowed"),
        (GENERATE, {**KEY, "origin": "http://localhost:81"}, 403, "origin_not_allowed"),
        (GENERATE, {**KEY, "sec-fetch-site": "cross-site"}, 403, "origin_not_allowed"),
        (GENERATE, {**KEY, "sec-fetch-site": "same-origin"}, 200, None),
        ("/mcp", {**KEY, "origin": "http://evil.example"}, 403, "origin_not_allowed"),
        ("/v1/models", {**KEY, "sec-fetch-site": "cross-site"}, 403, "origin_not_allowed"),
        ("/", {"sec-fetch-site": "cross-site"}, 200, None),
        (GENERATE, {**KEY, "content-length": f"{2**20 + 1}"}, 413, "too_large"),
        (EDIT, {**KEY, **FORM, "content-length": f"{2**25 + 1}"}, 413, "too_large"),
        (GENERATE, {**KEY, "content-type": "text/plain"}, 415, "content_type"),
    ],
)
def test_who_may_call(guarded, path, headers, status, code):
    async def call():
        async with in_process(guarded) as client:
            if path in (GENERATE, EDIT, "/mcp"):
                given = {**JSON_BODY["headers"], **headers}
                return await client.post(path, content=JSON_BODY["content"], headers=given)
            return await client.get(path, headers=headers)

    answer = asyncio.run(call())
    assert answer.status_code == status, answer.text
    if code is not None:
        assert answer.json()["error"]["code"] == code
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert len(answer.headers["x-request-id"]) == 32
    assert ("www-authenticate" in answer.headers) == (status == 401)
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_rate_limit_and_log(caplog):
    service, _ = stub_service()
    service.engine.start()
    app = api.create_app(service, Access(KEYS, rate=2))

    async def calls():
        async with in_process(app, headers=KEY) as client:
            return [await client.post(GENERATE, json={"prompt": "hush"}) for _ in range(3)]

    with caplog.at_level("INFO", "pixart_jax.access"):
        answers = asyncio.run(calls())
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    lines = [json.loads(r.message) for r in caplog.records if r.name == "pixart_jax.access"]
    assert [line["status"] for line in lines] == [200, 200, 429]
    assert lines[0]["key"] == "ann" and lines[0]["size"] == "64x64" and lines[0]["fill"] == 0.125
    assert "hush" not in caplog.text and "schl" not in caplog.text
    service.engine.close(5)


# ---- fuzz ----


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_requests_are_answered_without_a_500(guarded, caplog, count):
    """Random valid and invalid requests; every answer is 200, 429 or an error of the client."""
    rng = random.Random(0)
    names = [*api.EditRequest.model_fields, "x", "prompt" * 50]
    paths = [GENERATE, GENERATE, EDIT, "/v1/tokens", "/v1/models/%00", "/images/a", "/v1", "//"]

    def value(depth=0):
        plain = [None, True, 0, -1, 4, 2**70, 0.5, 1e308, "", "a", "64x64", "5", "\x00", "\u202e"]
        if depth < 2 and rng.random() < 0.2:
            return rng.choice([[value(depth + 1)], {rng.choice(names): value(depth + 1)}])
        return rng.choice(plain)

    async def call(client):
        body = {name: value() for name in rng.sample(names, rng.randrange(6))}
        if rng.random() < 0.7:
            body["prompt"] = rng.choice(["a", "\x07é", "<script>", "x" * 5000, " "])
        path = rng.choice(paths)
        raw = json.dumps(body).encode()
        if rng.random() < 0.2:
            cut = rng.randrange(len(raw))
            raw = raw[:cut] + rng.randbytes(3) + raw[cut:]
        if path == EDIT:
            files = {rng.choice(["image", "mask", "image[]", "x"]): ("a", rng.choice([png(), raw]))}
            texts = {name: str(text) for name, text in body.items()}
            return await client.post(path, data=texts, files=files)
        headers = {"content-type": rng.choice(["application/json"] * 4 + ["x", "multipart/x"])}
        method = rng.choice(["POST"] * 5 + ["GET", "PUT", "DELETE", "OPTIONS"])
        return await client.request(method, path, content=raw, headers=headers)

    async def calls():
        async with in_process(guarded, headers=KEY) as client:
            for _ in range(count):
                answer = await call(client)
                assert answer.status_code in (200, 400, 404, 405, 413, 415, 429), answer.text
                if answer.status_code >= 400 and answer.headers.get("content-type") != "text/plain":
                    assert answer.json()["error"]["message"]

    asyncio.run(calls())
    assert "Traceback" not in caplog.text and "failed" not in caplog.text

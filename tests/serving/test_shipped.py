"""The server over the shipped model: images that do not depend on what shares their batch, edits,
adapters, previews; the command in a process of its own: signals, bad input, agents over stdio."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import anyio
import httpx
import numpy as np
import pytest
import uvicorn
from mcp import Client, StdioServerParameters
from PIL import Image

from pixart_jax import cli
from pixart_jax.__main__ import main
from pixart_jax.commands import sample
from pixart_jax.images import canny
from pixart_jax.pipeline import Pipeline
from pixart_jax.serving import api
from pixart_jax.serving.engine import Limits
from pixart_jax.serving.opening import EngineFlags
from tests.serving.servers import ROOT, SHIPPED, listening
from tests.serving.test_api import pixels_of

CONTROL = ROOT / "assets" / "shapes_control"
GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def flags():
    from pixart_jax.pipeline.lora_flags import LoraFlags

    loras = LoraFlags(lora=(str(ROOT / "assets" / "shapes_heart"),))
    return EngineFlags(loras=loras, limits=Limits(4), steps_allowed=(4,), dtype="float32")


@pytest.fixture(scope="module")
def server(flags):
    engine, offer = flags.build()
    with listening(api.create_app(api.Service(engine, offer))) as url:
        limit = time.monotonic() + 120
        while engine.state in ("loading", "compiling") and time.monotonic() < limit:
            time.sleep(0.02)
        assert engine.state == "ready"
        yield url


def post(url, **body):
    answer = httpx.post(url + GENERATE, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return [one["b64_json"] for one in answer.json()["data"]]


def requests(count):
    prompts = ["a large red star left of a small blue circle", "two green squares", "a heart"]
    return [
        {
            "prompt": prompts[n % 3],
            "seed": n if n % 4 != 3 else str(2**64 - 2),
            "n": 1 + n % 3,
            "guidance_scale": 2 + n % 2,
            "negative_prompt": "blue" if n % 5 == 0 else "",
        }
        for n in range(count)
    ]


def check_independence(server, count):
    bodies = requests(count)
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        together = list(pool.map(lambda body: post(server, **body), bodies))
    assert together == [post(server, **body) for body in bodies]
    return together


def test_images_are_those_of_the_same_requests_alone_and_of_the_pipeline(server):
    together, body = check_independence(server, 3), requests(3)[1]
    pipe = Pipeline.from_pretrained(SHIPPED)
    ours = pipe(body["prompt"], steps=4, guidance=3.0, seed=1, batch_size=4, text_length=64)
    assert (pixels_of({"b64_json": together[1][0]}) == ours[0]).all()


@pytest.mark.slow
def test_sixteen_requests_at_once(server):
    check_independence(server, 16)


@pytest.mark.slow
def test_edits_adapters_and_previews(server):
    (first,) = post(server, prompt="a red circle", seed=1)
    heart = {"prompt": "a red heart", "seed": 1}
    merged = post(server, **heart, lora=[{"name": "shapes_heart"}])
    assert merged != post(server, **heart)
    assert merged == post(server, **heart, lora=[{"name": "shapes_heart", "weight": 1}])
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    file = io.BytesIO()
    mask.save(file, "png")
    files = {"image": ("a.png", base64.b64decode(first)), "mask": ("m.png", file.getvalue())}
    answer = httpx.post(
        server + EDIT, data={"prompt": "a green square", "seed": "3"}, files=files, timeout=120
    )
    (edited,) = answer.json()["data"]
    before, after = pixels_of({"b64_json": first}), pixels_of(edited)
    assert (before[:, 33:] == after[:, 33:]).all() and (before[:, :32] != after[:, :32]).any()
    assert np.isfinite(after).all()
    body = {"prompt": "a red circle", "seed": 1, "stream": True, "partial_images": 1}
    events = httpx.post(server + GENERATE, json=body, timeout=120).text
    data = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert [one["type"].rpartition(".")[2] for one in data] == ["partial_image", "completed"]
    assert pixels_of(data[0]).shape == (8, 8, 3)
    assert data[1]["b64_json"] == first  # a preview changes nothing


def test_the_shipped_models_controlnet_is_offered(flags):
    def offered(**changes):
        return dataclasses.replace(flags, **changes).build()[1].controlnets

    assert offered() == offered(model=ROOT / "assets/shapes") == ("shapes_control",)
    assert offered(controlnet="none") == ()


@pytest.mark.slow
def test_a_control_changes_the_image_as_sample_py_does(server, tmp_path):
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[12:40, 20:48] = 0
    edges = np.repeat(canny(picture)[..., None], 3, axis=-1)
    for name, pixels in (("picture", picture), ("edges", edges)):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    fields = {"prompt": "a red object", "seed": "1", "guidance_scale": "3"}

    def edited(name, **more):
        files = {"control": ("c.png", (tmp_path / f"{name}.png").read_bytes())}
        answer = httpx.post(server + EDIT, data={**fields, **more}, files=files, timeout=120)
        assert answer.status_code == 200, answer.text
        (one,) = answer.json()["data"]
        assert one["parameters"]["controlnet"] == "shapes_control"
        return pixels_of(one)

    ours = edited("edges")
    pipe = Pipeline.from_pretrained(SHIPPED, controlnet=CONTROL)
    how = {"steps": 4, "guidance": 3.0, "seed": 1, "batch_size": 4, "text_length": 64}
    np.testing.assert_array_equal(ours, pipe("a red object", control=edges, **how)[0])
    np.testing.assert_array_equal(ours, edited("picture", control_from="canny"))
    plain = pixels_of(
        {"b64_json": post(server, prompt="a red object", seed=1, guidance_scale=3)[0]}
    )
    np.testing.assert_array_equal(edited("edges", control_scale="0"), plain)
    assert np.abs(ours.astype(int) - plain).mean() > 5
    square = ours[16:36, 24:44].astype(int).mean((0, 1))  # inside the edges
    assert square[0] > square[1:].max() + 60
    flags = {"--model": SHIPPED, "--out": tmp_path / "out", "--controlnet": CONTROL, "--seed": 1}
    flags |= {"--control": tmp_path / "edges.png", "--prompt": "a red object", "--steps": 4}
    flags |= {"--guidance": 3, "--batch-size": 4}
    assert cli.run(sample.main, [str(part) for pair in flags.items() for part in pair]) == 0
    (file,) = (tmp_path / "out").glob("0*.png")
    difference = np.abs(np.asarray(Image.open(file)).astype(int) - ours).max()
    print(f"sample.py: {difference}")  # it pads texts to another length
    assert difference <= 1


# ---- the command ----


@pytest.fixture(autouse=True)
def loggers():
    """As they were before the command set them up."""
    found = [logging.getLogger(name) for name in ("pixart_jax", "uvicorn")]
    before = [(one.handlers, one.propagate, one.level) for one in found]
    yield
    for one, (one.handlers, one.propagate, level) in zip(found, before):
        one.setLevel(level)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "nowhere"], "no model folder"),
        (["--host", "0.0.0.0"], "--api-key-file"),
        (["--sizes", "64"], "WIDTHxHEIGHT"),
        (["--sizes", "63x64"], "multiple of 16"),
        (["--solvers", "dpm"], "unknown"),
        (["--batch-size", "0"], "at least 1"),
        (["--max-queue", "4"], "max queue 4"),
        (["--lora", "nowhere"], "nowhere"),
        (["--api-key-file", "nowhere"], "nowhere"),
        (["--port", "TAKEN"], "cannot listen"),
        (["--modle", "x"], "--model"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch, arguments, says):
    monkeypatch.delenv("PIXART_API_KEY", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = [port if one == "TAKEN" else one for one in arguments]
        assert cli.run(main, ["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err, err


@pytest.mark.parametrize("command", ["serve", "mcp", "evaluate study serve"])
def test_a_missing_extra_is_one_line(capsys, monkeypatch, command):
    for module in [name for name in sys.modules if name.startswith("pixart_jax.serving")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert cli.run(main, command.split()) == 2
    assert capsys.readouterr().err == 'error: fastapi is missing: pip install "pixart-jax[serve]"\n'


@contextlib.contextmanager
def serving(*arguments, env=()):
    """The command in a process; yields (process, its address) when it is ready."""
    command = [sys.executable, "-m", "pixart_jax", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **dict(env)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        url = process.stdout.readline().split(" at ")[1].split()[0]
        # it listens when it says so, and has its page before its model
        assert "<title>pixart_jax" in httpx.get(url).text
        assert httpx.get(f"{url}/readyz").json()["state"] in ("loading", "compiling")
        limit = time.monotonic() + 120
        while httpx.get(f"{url}/readyz").json()["state"] != "ready":
            assert time.monotonic() < limit
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait()


def test_only_a_trusted_proxy_names_the_caller_and_no_auth_is_spelled_out(monkeypatch):
    found = []

    def run(self, sockets):
        found.append(self.config)
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.delenv("PIXART_API_KEY", raising=False)
    for arguments in ([], ["--trusted-proxy", "10.0.0.7"], ["--host", "0.0.0.0", "--no-auth"]):
        assert cli.run(main, ["serve", "--port", "0", *arguments]) == 0
    assert [one.proxy_headers for one in found] == [False, True, False]
    assert found[1].forwarded_allow_ips == "10.0.0.7"


def test_a_damaged_model_is_one_line(capfd, tmp_path):
    """It shows only when the weights are read, beside the server that listens."""
    for part in SHIPPED.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "vae").unlink()
    shutil.copytree(SHIPPED / "vae", tmp_path / "vae")
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\xff" * 4)  # a NaN
    assert cli.run(main, ["serve", "--model", str(tmp_path), "--port", "0"]) == 2
    out, err = capfd.readouterr()
    assert out.count("\n") == 1 and " at http://127.0.0.1:" in out
    assert err.startswith("error: ") and err.count("\n") == 1 and "finite" in err, err


@pytest.mark.slow
def test_kill_9_leaves_nothing_behind(tmp_path):
    """No file, no process, and the port at once for the next server, whose page is there while it
    compiles."""
    env, options = {"TMPDIR": str(tmp_path)}, ["--batch-size", "4", "--steps-allowed", "4", "50"]
    with serving(*options, env=env) as (process, url):
        body = {"prompt": "a star", "seed": 1, "n": 4}
        expected = post(url, **body, num_inference_steps=4)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            # a generation, and an upload larger than what is kept in memory
            mine = pool.submit(httpx.post, url + GENERATE, json={**body, "num_inference_steps": 50})
            file = {"image": ("a.png", b"\x89PNG" + bytes(8 << 20))}
            theirs = pool.submit(httpx.post, url + EDIT, data={"prompt": "a"}, files=file)
            time.sleep(0.3)
            process.kill()
            for call in (mine, theirs):
                with contextlib.suppress(httpx.TransportError):
                    call.result(30)
    assert list(tmp_path.iterdir()) == []
    with serving(*options, "--port", url.rpartition(":")[2], env=env) as (_, again):
        assert again == url and post(url, **body, num_inference_steps=4) == expected
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sigterm_under_load_loses_no_accepted_request():
    options = ["--batch-size", "4", "--steps-allowed", "4", "20", "--drain-delay", "0.5"]
    with serving(*options) as (process, url):

        async def load():
            async with httpx.AsyncClient(base_url=url, timeout=120) as client:

                async def one(n):
                    body = {"prompt": f"a star {n}", "seed": n, "n": 2, "num_inference_steps": 20}
                    return await client.post(GENERATE, json=body)

                calls = [asyncio.ensure_future(one(n)) for n in range(12)]
                while int(waiting((await client.get("/metrics")).text)) < 8:
                    await asyncio.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.2)
                ready = await client.get("/readyz")
                late = await client.post(GENERATE, json={"prompt": "late"})
                return ready, late, await asyncio.gather(*calls)

        ready, late, answers = asyncio.run(load())
        assert (ready.status_code, ready.json()["state"]) == (503, "draining")
        assert late.status_code == 503 and late.json()["error"]["code"] == "draining"
        assert [answer.status_code for answer in answers] == [200] * 12
        assert process.wait(60) == 128 + signal.SIGTERM


def waiting(metrics: str) -> float:
    line = next(one for one in metrics.splitlines() if one.startswith("pixart_num_images_waiting "))
    return float(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("connect", [False, True])
def test_agents_over_stdio(mode, connect, tmp_path):
    """Nothing but the protocol on stdout: the client's parser fails on any other line."""
    options = ["--batch-size", "4", "--steps-allowed", "4"]

    async def session(arguments, env):
        command = ["-m", "pixart_jax", "mcp", *arguments]
        parameters = StdioServerParameters(
            command=sys.executable, args=command, env={**os.environ, **env}, cwd=ROOT
        )
        with anyio.fail_after(180):
            async with Client(parameters, mode=mode) as agent:
                tools = await agent.list_tools()  # answered before the model is open
                assert len(tools.tools) == 4
                while True:
                    found = await agent.call_tool("list_models", {})
                    if found.structured_content["state"] == "ready":
                        break
                    await anyio.sleep(0.2)
                call = {"prompt": "a red star", "seed": 1, "steps": 4}
                steps = []

                async def progress(done, total, message):
                    steps.append(done)

                made = await agent.call_tool("generate_image", call, progress_callback=progress)
                assert not made.is_error and steps[-1] == 4
                bad = await agent.call_tool("generate_image", {"prompt": "a", "size": "1x1"})
                assert bad.is_error and "not offered" in bad.content[0].text
                return made

    if connect:
        key = {"PIXART_API_KEY": "k"}
        with serving(*options, env=key) as (_, url):
            made = anyio.run(session, ["--connect", url], key)
            link = made.content[1].uri
            assert str(link).startswith("http://127.0.0.1")
    else:
        made = anyio.run(session, [*options, "--out", str(tmp_path)], {})
        (path,) = made.structured_content["paths"]
        assert Image.open(path).size == (64, 64)


@pytest.mark.slow
def test_replicas_on_ray_serve_give_equal_bytes(tmp_path):
    """Two replicas on one machine: the same seed, the same bytes, whichever answers."""
    import ray
    from ray import serve

    from pixart_jax.serving import ray_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = "--batch-size 4 --steps-allowed 4"
        serve.run(ray_app.app({"replicas": 2, "cpus": 0.5, "flags": options}), name="pixart")
        body = {"prompt": "a red star", "seed": 5}
        url = f"http://127.0.0.1:{port}"
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: post(url, **body), range(24)))
        assert len({one for (one,) in found}) == 1
    finally:
        serve.shutdown()
        ray.shutdown()

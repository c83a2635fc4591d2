"""Models by hub id, from a hub on loopback that speaks huggingface_hub's protocol."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pixart_jax.errors import UserError
from pixart_jax.weights import hub
from tests.weights import hub_server

NAME = "PixArt-alpha/PixArt-XL-2-1024-MS"


@pytest.fixture
def model(root):
    return root / "assets" / "shapes"


@pytest.fixture
def environment(tmp_path, root):
    """Of a program that uses the hub; the URL is set by the test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return {**kept, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(root)}


# Prints the folder of each NAME or NAME@REVISION; what fails is a line of its own.
FOLDERS = """
import sys
from pixart_jax import cli
from pixart_jax.weights import hub

def main(argv):
    name, _, revision = argv[0].partition("@")
    print(hub.model_folder(name, revision=revision or None))

sys.exit(max(cli.run(main, [name]) for name in sys.argv[1:]))
"""


def start(environment, code: str, *argv: str, **more) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**environment, **more}, text=True, **pipes)


def folders(environment, *names: str, **more) -> tuple[int, str, str]:
    """(status, stdout, stderr) of the program that prints their folders."""
    child = start(environment, FOLDERS, *names, **more)
    out, err = child.communicate(timeout=300)
    return child.returncode, out, err


def test_the_first_call_downloads_with_progress_and_the_second_needs_no_network(model, environment):
    files = [f for f in model.rglob("*") if f.is_file()]
    with hub_server.serve({NAME: model}) as server:
        _, out, err = folders(environment, NAME, NAME, HF_ENDPOINT=server.url)
        assert "Fetching" in err and "100%" in err and len(server.downloads) == len(files)
    folder, again = out.splitlines()
    assert again == folder
    for file in files:
        copy = os.path.join(folder, file.relative_to(model))
        assert open(copy, "rb").read() == file.read_bytes()
    assert folders(environment, NAME, HF_HUB_OFFLINE="1")[:2] == (0, f"{folder}\n")
    # the server has gone
    status, out, err = folders(environment, NAME, "some/other", HF_ENDPOINT=server.url)
    assert out == f"{folder}\n" and status == 2
    assert "hub cannot be reached" in err and err.count("\n") == 1


def _finished(blobs) -> set[str]:
    return {file.name for file in blobs.glob("*") if re.fullmatch("[0-9a-f]{40}", file.name)}


def _kill_while_it_downloads(child, blobs, server) -> set[str]:
    """Kill the program when five files are there and another is half written; the five."""
    deadline = time.monotonic() + 300
    while not list(blobs.glob("*.incomplete")) or len(_finished(blobs)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert list(blobs.glob("*.incomplete"))
    asked = None
    while asked != len(server.requests):  # the killed program's last ones are served
        asked = len(server.requests)
        time.sleep(1)
    server.requests.clear()
    server.delay = 0.0
    return _finished(blobs)


@pytest.mark.slow
def test_sample_py_with_an_id_killed_while_it_downloads(model, environment, tmp_path, root):
    blobs = tmp_path / "hf" / "hub" / f"models--{NAME.replace('/', '--')}" / "blobs"
    command = [sys.executable, "sample.py", "--model", NAME, "--prompt", "a large red star"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": root}

    def sample(out: str, **more) -> subprocess.Popen:
        made = [*command, "--out", str(tmp_path / out)]
        return subprocess.Popen(made, env={**environment, **more}, **pipes)

    with hub_server.serve({NAME: model}, delay=0.02) as server:
        child = sample("first", HF_ENDPOINT=server.url)
        finished = _kill_while_it_downloads(child, blobs, server)
        assert not list(tmp_path.glob("first/*.png"))
        _, err = sample("first", HF_ENDPOINT=server.url).communicate(timeout=300)
        count = len([f for f in model.rglob("*") if f.is_file()])
        assert len(server.downloads) == count - len(finished), err
    assert sample("second", HF_HUB_OFFLINE="1").wait(timeout=300) == 0
    (first,), (second,) = (list(tmp_path.glob(f"{out}/*.png")) for out in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_a_killed_download_is_finished_by_the_next_call(model, environment, tmp_path):
    with hub_server.serve({NAME: model}, delay=0.02) as server:
        child = start(environment, FOLDERS, NAME, HF_ENDPOINT=server.url)
        blobs = tmp_path / "hf" / "hub" / f"models--{NAME.replace('/', '--')}" / "blobs"
        finished = _kill_while_it_downloads(child, blobs, server)
        _, out, err = folders(environment, NAME, HF_ENDPOINT=server.url)
        assert out, err
        files = [f for f in model.rglob("*") if f.is_file()]
        assert len(server.downloads) == len(files) - len(finished)
    assert not list(blobs.glob("*.incomplete"))


def test_a_mistake_is_one_line(model, environment):
    said = {
        "PixArt-alpha/PixArt-XL-2-1024": "no model of that id on the hub",
        hub_server.GATED: "is gated: accept its terms on the hub, then set HF_TOKEN",
        f"{NAME}@v9": "has no revision 'v9'",
    }
    with hub_server.serve({NAME: model}) as server:
        status, out, err = folders(environment, *said, HF_ENDPOINT=server.url)
    assert status == 2 and out == ""
    for line, (name, text) in zip(err.splitlines(), said.items(), strict=True):
        assert line.startswith(f"error: {name.partition('@')[0]}") and text in line


def test_a_path_is_never_looked_up(tmp_path):
    for path in (tmp_path, tmp_path / "absent", "absent", "./a/b", "a/b/c"):
        assert str(hub.model_folder(path)) == str(path).removeprefix("./")


RELEASED = [
    "README.md",
    "model_index.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.bin",
    "vae/diffusion_pytorch_model.bin",
]


@pytest.mark.parametrize(
    ("parts", "variant", "left_out"),
    [
        (hub.PARTS, None, {"README.md", RELEASED[8], RELEASED[10], RELEASED[12]}),
        (("vae",), None, {"README.md", *RELEASED[3:6], *RELEASED[8:11], RELEASED[12]}),
        (("transformer",), "fp16", {"README.md", *RELEASED[3:6], *RELEASED[8:10], *RELEASED[12:]}),
    ],
)
def test_only_what_is_needed_is_downloaded(parts, variant, left_out):
    assert set(hub.wanted(RELEASED, parts, variant)) == set(RELEASED) - left_out


def test_a_sole_variant_is_taken_and_of_several_one_must_be_named():
    vae = ["vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"]
    assert hub.wanted(vae, hub.PARTS) == vae
    with pytest.raises(UserError, match="vae has no weights of variant 'none'.* bf16, fp16; "):
        hub.wanted([*vae, "vae/diffusion_pytorch_model.bf16.safetensors"], hub.PARTS)
    with pytest.raises(UserError, match="no weights of variant 'fp8': there are fp16"):
        hub.wanted(vae, hub.PARTS, "fp8")


def test_a_part_without_the_wanted_variant_is_taken_plain_and_a_variant_only_as_bin_too():
    files = ["vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"]
    files += ["text_encoder/model.safetensors", "text_encoder/pytorch_model.fp16.bin"]
    assert hub.wanted(files, hub.PARTS, "fp16") == [files[0], files[3]]
    sharded = ["model-00001-of-00002.fp16.safetensors", "model.fp16.safetensors.index.json"]
    sharded += ["model.safetensors.index.fp16.json", "model.fp16-00002-of-00002.safetensors"]
    plain = ["model.safetensors.index.json", "model-00001-of-00001.safetensors"]
    assert hub.wanted([*sharded, *plain], (), "fp16") == sharded
    assert sorted(hub.wanted([*sharded, *plain], ())) == sorted(plain)


def test_caption_takes_an_id_and_downloads_one_set_of_weights(environment, tmp_path):
    folder, variants = tmp_path / "vlm", {"some/vlm": None, "other/vlm": "fp16"}
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llava"}')
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "flax_model.msgpack",
    ]
    for file in (*names, "chat_template.jinja", "preprocessor_config.json", "README.md"):
        (folder / file).write_text(file)
    code = (
        "from pixart_jax.captioning import model\n"
        f"for name, variant in {variants}.items():\n"
        "    folder = model.local(name, variant)\n"
        "    print(model.check(folder).model_type, model.identity(name, variant))\n"
    )
    with hub_server.serve(dict.fromkeys(variants, folder)) as server:
        out, err = start(environment, code, HF_ENDPOINT=server.url).communicate(timeout=300)
    assert out.splitlines() == [f"llava {name}@{hub_server.SHA}" for name in variants], err
    for name, variant in variants.items():
        weights = "model.fp16.safetensors" if variant else "model.safetensors"
        wanted = {"config.json", "chat_template.jinja", "preprocessor_config.json", weights}
        got = [path for path in server.downloads if path.startswith(f"/{name}/")]
        assert {path.rpartition("/")[2] for path in got} == wanted


def test_a_pipeline_and_a_component_open_by_id(model, environment):
    code = (
        "import numpy as np, pixart_jax\n"
        "pipe = pixart_jax.Pipeline.from_pretrained('some/model')\n"
        "shipped = pixart_jax.Pipeline.from_pretrained('assets/shapes')\n"
        "images = [p(['a red circle'], steps=2, seed=1) for p in (pipe, shipped)]\n"
        "np.testing.assert_array_equal(*images)\n"
        "print(pixart_jax.load_component('some/model/vae').config.scaling_factor)\n"
        "from pixart_jax.pipeline.folder import ModelFolder\n"
        "ModelFolder.open('other/model', ('transformer', 'vae'))\n"  # as with --text-states
    )
    with hub_server.serve({"some/model": model, "other/model": model}) as server:
        child = start(environment, code, HF_ENDPOINT=server.url)
        out, err = child.communicate(timeout=300)
    assert child.returncode == 0 and float(out) > 0, err
    parts = {path.split("/")[-2] for path in server.downloads if path.endswith(".safetensors")}
    states = [path for path in server.downloads if "other/model" in path and "text_enc" in path]
    assert "text_encoder" in parts and [path.rpartition("/")[2] for path in states] == [
        "config.json"
    ]


def test_an_adapter_is_downloaded_by_id_and_a_file_of_several_by_name(environment, tmp_path):
    code = "import sys; from pixart_jax.weights import lora; print(*map(lora.find, sys.argv[1:]))"
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "b.safetensors"):
        (repository / name).write_text(name)
    with hub_server.serve({"some/style": repository}) as server:
        names = "some/style", "some/style/b.safetensors"
        found = start(environment, code, *names, HF_ENDPOINT=server.url).communicate()[0].split()
    assert [os.path.basename(file) for file in found] == [
        "adapter_model.safetensors",
        "b.safetensors",
    ]
    assert all(open(file).read() == os.path.basename(file) for file in found)
    assert not any("README" in path for path in server.downloads)

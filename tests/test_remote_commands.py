"""The programs with gs:// and s3:// addresses for models, images, prompts and shards, against
emulators on loopback."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from configs.shapes import get_config as shapes
from pixart_jax import cli, files
from pixart_jax.commands import sample
from pixart_jax.commands.sample_flags import Flags
from pixart_jax.encoding import command as encode_command
from pixart_jax.images import png_settings
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.pipeline.output import OutputFolder, PromptShard
from pixart_jax.remote_path import RemotePath, located
from pixart_jax.text import read_prompts
from pixart_jax.training.frozen import Frozen
from pixart_jax.weights import hub
from pixart_jax.weights.component import load_component
from tests.stores import environment


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    hub._staged.cache_clear()
    return tmp_path / "cache"


def test_a_model_of_a_bucket_is_staged_once_and_as_it_is(store, tiny_model, cache):
    files.upload(tiny_model, f"{store.root}/models/tiny", last="model_index.json")
    given = Path(f"{store.root}/models/tiny")  # as tyro or a caller may hand it on
    found = ModelFolder.open(given, ("transformer", "vae"))
    local = ModelFolder.open(tiny_model, ("transformer", "vae"))
    assert found.name == local.name == "tiny"
    assert found.fingerprint("transformer") == local.fingerprint("transformer")
    found.check_weights(("transformer", "vae"))
    staged = {p.relative_to(found.path).as_posix() for p in found.path.rglob("*.safetensors")}
    assert staged and not any(name.startswith("text_encoder") for name in staged)
    before = store.proxy.requests["GET"]
    assert ModelFolder.open(given, ("transformer", "vae")).path == found.path
    assert store.proxy.requests["GET"] == before
    ours, theirs = (load_component(f"{x}/vae") for x in (given, tiny_model))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)


def test_a_text_encoder_of_a_bucket_has_its_tokenizer_beside_it(gs, tiny_model, tmp_path):
    for part in ("text_encoder", "tokenizer"):
        files.upload(tiny_model / part, f"{gs.root}/alone/{part}")
    texts = ["a red circle"]
    states = []
    for folder in (f"{gs.root}/alone", f"{gs.root}/alone/text_encoder", str(tiny_model)):
        frozen = Frozen(dataclasses.replace(shapes(), text_encoder=folder), tmp_path)
        states += frozen.text_states(texts, 16)
    for state in states[:2]:
        np.testing.assert_array_equal(state, states[2])


WANTED = [
    {"prompt": f"picture {n}", "index": n, "seed": 0, "height": 8, "width": 8, "guidance": 1}
    for n in range(6)
]


def test_images_in_a_bucket_are_written_once(s3):
    out = f"{s3.root}/images"
    folder = OutputFolder(out, WANTED, PromptShard(0, 2))
    assert folder.missing == folder.mine
    for n in folder.mine:
        folder.write(n, np.full((8, 8, 3), 20 * n, np.uint8))
    other = {**WANTED[0], "guidance": 2}
    s3.proxy.requests.clear()
    again = OutputFolder(out, [*WANTED, other])
    assert again.missing == [1, 3, 5, 6] and str(again.paths[6]).endswith("_0_2.png")
    assert s3.proxy.requests["GET"] <= 1 + 4  # the listing, and the head of each image there
    for n in again.missing:
        again.write(n, np.full((8, 8, 3), 20 * n, np.uint8))
    folder.wait(every=0.01)
    sheet = folder.write_grid()
    assert isinstance(sheet, RemotePath) and sheet.is_file()
    with again.paths[3].open() as file, Image.open(file) as image:
        assert np.asarray(image)[0, 0].tolist() == [60, 60, 60]
    assert png_settings(again.paths[6]) == other


def test_prompts_of_a_bucket_and_their_files(gs):
    files.put(f"{gs.root}/p/rows.csv", b"prompt,seed,image\na red star,3,star.png\n")
    (row,) = read_prompts(located(f"{gs.root}/p/rows.csv"))
    assert row.overrides() == {"seed": 3, "image": f"{gs.root}/p/star.png"}
    files.put(f"{gs.root}/p/bad.csv", b"prompt,seed\na,b\n")
    argv = ["--prompts", f"{gs.root}/p/bad.csv"]
    assert cli.run(sample.main, argv) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model s3://no-such-bucket-at-all/m", "there is no bucket no-such-bucket-at-all"),
        ("--model {}/nothing", "no such object, and none below it"),
        ("--out s3://no-such-bucket-at-all/o", "there is no bucket no-such-bucket-at-all"),
        ("--out az://bucket/o", "begin with gs:// or s3://"),
        ("--out s3:///o", "write s3://BUCKET/NAME"),
        ("--controlnet {}/nothing --control x.png", "no such"),
        ("--lora {}/nothing", "no such object, and none below it"),
        ("--weights-cache s3://bucket/c", "local path"),
    ],
)
def test_mistakes_are_one_line_before_anything_compiles(s3, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(sample, "generate", lambda *_: pytest.fail("went on"))
    argv = ["--prompt", "x", *flags.format(s3.root).split()]
    assert cli.run(sample.main, argv) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_flag_for_local_files_refuses_a_bucket(capsys):
    argv = ["--prompts", "p.txt", "--out", "s3://bucket/states.safetensors"]
    assert cli.run(encode_command.main, argv) == 2
    assert "s3://bucket/states.safetensors: a local path is needed" in capsys.readouterr().err


def test_flags_of_addresses_keep_them():
    flags = cli.parse(Flags, ["--prompt", "x", "--out", "gs://b/o"], prog="sample.py")
    assert isinstance(flags.out, RemotePath) and str(flags.out) == "gs://b/o"
    assert flags.model.name == "shapes" and flags.text_states is None


def program(root: Path, cache: Path, *argv: object) -> str:
    command = [sys.executable, *map(str, argv)]
    how = {"env": environment(PIXART_JAX_CACHE=str(cache)), "cwd": root}
    done = subprocess.run(command, **how, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_shipped_model_from_a_bucket_generates_into_a_bucket(s3, root, tmp_path):
    """sample.py --model s3://… --prompts s3://… --out s3://…: the images of a disk."""
    files.upload(root / "assets/shapes", f"{s3.root}/shapes", last="model_index.json")
    files.put(f"{s3.root}/p.txt", b"a large red star\na small blue circle\n")
    (tmp_path / "p.txt").write_text("a large red star\na small blue circle\n")
    there = ["--model", f"{s3.root}/shapes", "--prompts", f"{s3.root}/p.txt"]
    here = ["--model", "assets/shapes", "--prompts", tmp_path / "p.txt"]
    sampled = ["sample.py", "--steps", 4]
    program(root, tmp_path / "c", *sampled, *here, "--out", tmp_path / "out")
    said = program(root, tmp_path / "c", *sampled, *there, "--out", f"{s3.root}/out")
    assert f"2 images in {s3.root}/out/" in said
    local = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert {e.address.rpartition("/")[2] for e in files.list_files(f"{s3.root}/out")} == set(local)
    assert all(files.read_bytes(f"{s3.root}/out/{name}") == data for name, data in local.items())
    before = s3.proxy.requests["PUT"]
    said = program(root, tmp_path / "c", *sampled, *there, "--out", f"{s3.root}/out")
    assert (
        "2 of them already there" in said and s3.proxy.requests["PUT"] <= before + 2
    )  # probe, grid


RECIPE = """
import dataclasses
import sys
from configs.shapes import get_config as shapes
from pixart_jax.config import DataConfig, PreviewConfig

def get_config():
    config = shapes()
    data = DataConfig("set", captions=(("dense", 1.0),), max_text_tokens=64)
    changes = {"steps": 8, "batch_size": 8, "data": data, "start": "assets/shapes"}
    stage = dataclasses.replace(config.stages[1], **changes)
    return dataclasses.replace(config, stages=(stage,), log_every=1, preview=PreviewConfig())
"""


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 2])
def test_shards_encoded_into_a_bucket_train_as_those_of_a_disk(gs, root, tmp_path, window):
    """encode --out gs://…, then train.py on them, from a model in the bucket."""
    files.upload(root / "assets/shapes", f"{gs.root}/shapes", last="model_index.json")
    (tmp_path / "recipe.py").write_text(RECIPE)
    losses = {}
    for name, place in (("gs", gs.root), ("disk", tmp_path)):
        model = f"{gs.root}/shapes" if name == "gs" else "assets/shapes"
        made = ["--limit", 96, "--shard-size", 16, "--captions", "dense", "--max-text-tokens", 64]
        encode = ["-m", "pixart_jax", "encode", *made, "--out", f"{place}/w{window}"]
        assert "96 records" in program(root, tmp_path / "c", *encode, "--model", model)
        fields = {"stages.0.data.source": f"{place}/w{window}", "stages.0.start": model}
        fields |= {"stages.0.data.shuffle-shards": window, "vae": model, "text-encoder": model}
        over = [word for field, value in fields.items() for word in (f"--{field}", value)]
        run = ["train.py", tmp_path / "recipe.py", "--workdir", tmp_path / name, *over]
        program(root, tmp_path / "c", *run)
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses[name] = [row["loss"] for row in rows if "loss" in row]
    assert losses["gs"] == losses["disk"] and len(losses["gs"]) == 8

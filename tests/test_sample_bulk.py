"""sample.py for work in bulk: texts encoded once, the text encoder gone before the denoising, a
list shared by processes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from pixart_jax import cli
from pixart_jax.commands import sample
from pixart_jax.encoding import command as encode_command
from pixart_jax.errors import UserError
from pixart_jax.images import png_settings
from pixart_jax.pipeline import folder as folders
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.pipeline.output import AsyncWriter, OutputFolder, PromptShard
from tests import tiny_diffusers

PROMPTS = ["a large red circle", "a small blue star", "a green square"]
PROMPTS += ["the yellow star above", "a red and a blue circle"]


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    (tmp_path / "p.txt").write_text("\n".join([*PROMPTS[:2], "", *PROMPTS[2:], "  "]))
    return tmp_path / "p.txt"


def pictures(folder: Path, names: str = "0*.png") -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.glob(names)):
        with Image.open(path) as image:
            found[path.name] = np.asarray(image).astype(int)
    return found


def assert_within(a: Path, b: Path, levels: int) -> None:
    one, other = pictures(a), pictures(b)
    assert list(one) == list(other) and len(one) == len(PROMPTS)
    assert max(np.abs(one[name] - other[name]).max() for name in one) <= levels


# Text states.


def generate(model: Path, out: Path, *flags, **paths) -> None:
    """sample.py with flags between blanks and flags of paths, without a sheet."""
    argv = ["--model", str(model), "--out", str(out), "--no-grid", *" ".join(flags).split()]
    for name, path in paths.items():
        argv += [f"--{name.replace('_', '-')}", str(path)]
    assert cli.run(sample.main, argv) == 0


def encode(model: Path, prompts: Path, out: Path, *flags: str) -> Path:
    argv = f"--prompts {prompts} --model {model} --out {out}".split()
    assert cli.run(encode_command.main, [*argv, *flags]) == 0
    return out


def test_text_states_give_the_same_images_and_the_text_encoder_is_never_opened(
    tiny_model, prompt_file, tmp_path, monkeypatch, capsys
):
    from pixart_jax.weights import component

    how = ("--steps 2 --batch-size 2",)
    generate(tiny_model, tmp_path / "plain", *how, prompts=prompt_file)
    states = {stored: tmp_path / f"{stored}.safetensors" for stored in ("float32", "bfloat16")}
    for stored, path in states.items():
        encode(tiny_model, prompt_file, path, "--stored", stored)
    opened, real = [], component.load_component

    def watched(folder, **how):
        opened.append(Path(folder).name)
        return real(folder, **how)

    monkeypatch.setattr(component, "load_component", watched)
    for stored, path in states.items():
        generate(tiny_model, tmp_path / stored, *how, prompts=prompt_file, text_states=path)
    assert sorted(set(opened)) == ["transformer", "vae"]
    assert_within(tmp_path / "float32", tmp_path / "plain", 0)
    # of 255: the effect of eight bits of mantissa on random weights
    assert_within(tmp_path / "bfloat16", tmp_path / "plain", 12)
    # Exact states give the same images, so a call without them finds these there; rounded ones
    # are recorded.
    capsys.readouterr()
    generate(tiny_model, tmp_path / "float32", *how, prompts=prompt_file)
    assert "5 of them already there" in capsys.readouterr().out
    (path,) = (tmp_path / "bfloat16").glob("0000*.png")
    assert png_settings(path)["text_states"] == "float32 kept as bfloat16"
    # A machine that samples from states needs no weights of the text encoder.
    light = tmp_path / "light" / tiny_model.name
    shutil.copytree(tiny_model, light, ignore=shutil.ignore_patterns("model.safetensors"))
    exact = {"prompts": prompt_file, "text_states": states["float32"]}
    generate(light, tmp_path / "lightly", *how, **exact)
    assert_within(tmp_path / "lightly", tmp_path / "plain", 0)


def test_text_states_that_do_not_fit_are_one_line_and_nothing_is_begun(
    tiny_model, prompt_file, tmp_path, capsys
):
    kept = encode(tiny_model, prompt_file, tmp_path / "kept.safetensors")
    (tmp_path / "short.safetensors").write_bytes(kept.read_bytes()[:-100])
    sigma, wide, other = (tmp_path / name for name in ("sigma", "wide", "other"))
    for folder in (sigma, wide, other):
        shutil.copytree(tiny_model, folder)
    index = (sigma / "model_index.json").read_text()
    (sigma / "model_index.json").write_text(index.replace("PixArtAlpha", "PixArtSigma"))
    tiny_diffusers.build(other, seed=1)
    for part, field in (("transformer", "caption_channels"), ("text_encoder", "d_model")):
        config = wide / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), field: 8}))
    lower = "another cleaning of prompts (deepfloyd) than this model's (lower case)"
    vae = tiny_model / "vae" / "diffusion_pytorch_model.safetensors"
    cases = [
        (tiny_model, kept, ["--prompt", "a red hat"], "a prompt is not in"),
        (tiny_model, kept, ["--negative-prompt", "a hat"], "a prompt is not in"),
        (tiny_model, kept, ["--no-clean-caption"], lower),
        (tiny_model, tmp_path / "absent.safetensors", [], "no text states"),
        (tiny_model, tmp_path, [], "is a folder"),
        (tiny_model, tmp_path / "short.safetensors", [], "damaged or cut short"),
        (tiny_model, vae, [], "holds no text states"),
        (sigma, kept, [], "another limit of tokens (120) than this model's (300)"),
        (wide, kept, [], "another width (16) than this model's (8)"),
        (other, kept, [], "another text encoder"),
    ]
    capsys.readouterr()
    for model, states, more, says in cases:
        argv = f"--model {model} --text-states {states} --out {tmp_path}/out".split()
        assert cli.run(sample.main, [*argv, "--prompt", PROMPTS[0], *more]) == 2, says
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
        assert not (tmp_path / "out").exists()


def test_a_prompt_of_5000_characters_runs_with_one_line_that_names_the_lost_words(
    tiny_model, tmp_path, capsys
):
    prompt = ("a red circle and " * 300)[:4980] + "zebra"
    generate(tiny_model, tmp_path / "out", "--steps 1", prompt=prompt)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    (said,) = (line for line in lines if line.startswith("warning: "))
    assert "was cut to 120" in said and "lost are its last " in said
    assert said.endswith("zebra'") and "words: " in said and len(said) < 500
    (path,) = (tmp_path / "out").glob("*.png")
    assert png_settings(path)["prompt"] == prompt  # whole


# The text encoder and memory.

MEASURED = """
import json, sys
import jax
from pixart_jax.commands import sample
from pixart_jax.pipeline import Pipeline
from pixart_jax.weights import component

model, prompts, out = sys.argv[1:]

def live():
    return sum(array.nbytes for array in jax.live_arrays())

def bytes_of(part):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(part.params))

seen, real, call, found = {}, Pipeline._images, component.TextEncoder.apply, {}
def images(self, *args, **how):
    made = jax.block_until_ready(real(self, *args, **how))
    seen["denoise"] = max(seen["denoise"], live())
    found["rest"] = bytes_of(self.transformer) + bytes_of(self.vae)
    return made
def apply(self, *args):
    seen["encode"] = max(seen["encode"], live())
    found["t5"] = bytes_of(self)
    return call(self, *args)
Pipeline._images, component.TextEncoder.apply = images, apply
for mode in ("always", "never"):
    seen.update(denoise=0, encode=0)
    flags = ["--model", model, "--prompts", prompts, "--out", f"{out}/{mode}", "--steps", "2"]
    assert sample.main([*flags, "--offload-text-encoder", mode]) == 0
    print("MEASURED " + json.dumps({"mode": mode, **seen, **found}))
"""


def test_the_text_encoder_is_gone_while_denoising_and_the_images_are_the_same_to_the_bit(
    root, prompt_file, tmp_path
):
    paths = (root / "assets" / "shapes", prompt_file, tmp_path)
    command = [sys.executable, "-c", MEASURED, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("MEASURED ")]
    always, never = (json.loads(line.removeprefix("MEASURED ")) for line in lines)
    small = 300_000  # bytes: latents, states, images
    assert always["encode"] < always["t5"] + small  # nothing else is open yet
    assert always["denoise"] < always["rest"] + small  # and then the text encoder is not
    assert never["denoise"] > never["rest"] + never["t5"]
    assert_within(tmp_path / "always", tmp_path / "never", 0)


def test_auto_looks_at_the_sizes_on_disk_and_at_the_memory(tiny_model, monkeypatch):
    from pixart_jax.weights.component import load_component

    parts = [load_component(tiny_model / part) for part in ("transformer", "text_encoder", "vae")]
    needed = sum(leaf.nbytes for part in parts for leaf in jax.tree.leaves(part.params))
    for share, offloads in ((0.5, True), (1.2, True), (2.0, False)):
        monkeypatch.setattr(folders, "available_memory", lambda share=share: share * needed)
        assert ModelFolder.open(tiny_model).should_offload() == offloads
    monkeypatch.undo()
    # this machine has room for a few kilobytes
    assert not ModelFolder.open(tiny_model).should_offload()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--text-encoder-int8",)], ids=["floats", "int8"])
def test_a_mesh_that_cuts_the_parameters_gives_the_same_images(
    root, tiny_model, prompt_file, tmp_path, more
):
    """Four simulated devices, the parameters in four parts."""
    generate(tiny_model, tmp_path / "one", "--steps 3", *more, prompts=prompt_file)
    argv = f"--model {tiny_model} --prompts {prompt_file} --steps 3 --no-grid".split()
    argv += ["--mesh", "fsdp=4", "--out", str(tmp_path / "four"), *more]
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, str(root / "sample.py"), *argv]
    subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert_within(tmp_path / "one", tmp_path / "four", 1)


def test_int8_is_recorded_in_the_png_and_changes_little(tiny_model, prompt_file, tmp_path):
    how = {"prompts": prompt_file}
    generate(tiny_model, tmp_path / "floats", "--steps 2", **how)
    generate(tiny_model, tmp_path / "int8", "--steps 2 --text-encoder-int8", **how)
    (path,) = (tmp_path / "int8").glob("0000*.png")
    assert png_settings(path)["text_encoder"] == "int8"
    one, other = (pictures(tmp_path / name) for name in ("floats", "int8"))
    assert max(np.abs(one[name] - other[name]).max() for name in one) > 0  # it was really rounded
    assert np.mean([np.abs(one[name] - other[name]).mean() for name in one]) < 8
    flags = ("--stored", "float32", "--text-encoder-int8")
    states = encode(tiny_model, prompt_file, tmp_path / "s.safetensors", *flags)
    generate(tiny_model, tmp_path / "states", "--steps 2", **how, text_states=states)
    assert_within(tmp_path / "states", tmp_path / "int8", 0)
    (path,) = (tmp_path / "states").glob("0000*.png")
    assert png_settings(path)["text_states"] == "float32 from int8 kept as float32"


# Shares.


def start(root: Path, model: Path, prompts: Path, out: Path, *more: str, **env: str):
    """sample.py in a process of its own."""
    argv = f"--model {model} --prompts {prompts} --out {out} --steps 2".split()
    command = [sys.executable, str(root / "sample.py"), *argv, *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **env}, **pipes)


def finished(run: subprocess.Popen) -> str:
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return out + err


@pytest.fixture
def sized(tmp_path) -> Path:
    """Prompts of two sizes, in turns."""
    rows = [{"prompt": prompt, "width": (64, 96)[n % 2]} for n, prompt in enumerate(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "p.jsonl"


@pytest.mark.slow
def test_two_processes_draw_together_what_one_draws(root, tiny_model, sized, tmp_path):
    both = [start(root, tiny_model, sized, tmp_path / "two", "--share", f"{k}/2") for k in (0, 1)]
    first, second = (finished(run) for run in both)
    finished(start(root, tiny_model, sized, tmp_path / "one"))
    for said in ("3 images in", "(share 0/2 of 5)", "waiting for the other shares", "grid.png"):
        assert said in first
    assert "2 images in" in second and "images/s" not in second and "grid.png" not in second
    assert_within(tmp_path / "two", tmp_path / "one", 1)
    grid, other = (pictures(tmp_path / name, "grid.png")["grid.png"] for name in ("two", "one"))
    assert np.abs(grid - other).max() <= 1


@pytest.mark.slow
def test_two_processes_of_a_detected_cluster_draw_together(root, tiny_model, sized, tmp_path):
    """As SLURM starts them; JAX's own multi-process runtime between them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    job |= {"SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": port}
    share = (root, tiny_model, sized, tmp_path / "two", "--share", "cluster")
    runs = [start(*share, SLURM_PROCID=str(k), SLURM_LOCALID=str(k), **job) for k in (0, 1)]
    said = [finished(run) for run in runs]
    assert "share 0/2" in said[0] and "share 1/2" in said[1]
    assert len(pictures(tmp_path / "two")) == len(PROMPTS)
    assert (tmp_path / "two" / "grid.png").is_file()


def test_shares_are_disjoint_whole_and_even_in_every_size():
    sizes = [(64, 64)] * 7 + [(64, 96)] * 5 + [(64, 64)] * 2
    parts = [PromptShard(k, 3).of(sizes) for k in range(3)]
    assert sorted(n for part in parts for n in part) == list(range(14))
    for size in set(sizes):
        counts = [sum(sizes[n] == size for n in part) for part in parts]
        assert max(counts) - min(counts) <= 1


def test_the_sheet_is_not_waited_for_without_end(tmp_path):
    common = {"seed": 0, "height": 8, "width": 8, "guidance": 1}
    wanted = [{"prompt": prompt, "index": n, **common} for n, prompt in enumerate(PROMPTS)]
    mine = OutputFolder(tmp_path, wanted, PromptShard(0, 2))
    for n in mine.mine:
        mine.write(n, np.zeros((8, 8, 3), np.uint8))
    says = (
        "2 images of the other processes are not in .* this share is done; start the others again"
    )
    with pytest.raises(UserError, match=says):
        mine.wait(patience=0.05, every=0.02)


# Writing.


def test_a_slow_disk_holds_the_drawing_up_only_when_the_queue_is_full():
    gate, written = threading.Event(), []
    with AsyncWriter(lambda n: gate.wait() and written.append(n), limit=6) as writer:
        for n in range(6):
            writer.put(n)  # returns though nothing can be written
        late = threading.Thread(target=writer.put, args=(6,))
        late.start()
        late.join(0.2)
        assert late.is_alive() and not written
        gate.set()
        late.join()
    assert sorted(written) == list(range(7))


def test_what_a_writing_thread_meets_stops_the_drawing():
    def full(n):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), AsyncWriter(full, limit=2) as writer:
        for n in range(10):
            writer.put(n)
    with pytest.raises(OSError, match="No space"), AsyncWriter(full) as writer:
        writer.put(0)  # the last one is not lost either

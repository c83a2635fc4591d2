"""A whole run of three stages: what it leaves, and that a killed one ends the same to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run
from PIL import Image
from tiny_run import Killed, figures, final_state, kill_before

from pixart_jax import cli
from pixart_jax.commands import train
from pixart_jax.config import DataConfig, ProfileConfig
from pixart_jax.data import records
from pixart_jax.data.sources import Sample
from pixart_jax.errors import Notice
from pixart_jax.training import batches, stages, step
from pixart_jax.training.metrics import read
from tests.data import tiny_sets

STEPS = 7 + 8 + 9


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_run.curriculum(folder)
    return folder


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """(workdir, the compiled steps of its stages, the parts of its stages) of an uninterrupted
    run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    compiled, prepared = [], []

    def recorded(function, made):
        return lambda *arguments: made.append(function(*arguments)) or made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiled_step", recorded(step.compiled_step, compiled))
        patch.setattr(stages, "build_stage", recorded(stages.build_stage, prepared))
        train.train(tiny_run.curriculum(world), workdir)
    return workdir, compiled, prepared


def checkpoints(workdir: Path) -> set[int]:
    """The total steps of the checkpoints."""
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


def test_one_executable_a_stage_and_bucket(finished):
    assert [step.executables for step in finished[1]] == [1, 1, 2]


def test_what_a_run_leaves(finished):
    workdir = finished[0]
    stages = {"pixels": 7, "words": 8, "beauty": 9}
    steps = [(name, step) for name, count in stages.items() for step in range(1, count + 1)]
    assert [(line["stage"], line["step"]) for line in figures(workdir)] == steps
    assert {"loss", "mse", "vb", "lr", "grad_norm"} <= set(figures(workdir)[0])
    grids = {path.name for path in (workdir / "samples").iterdir()}
    assert grids == {f"{name}-{steps:07d}.png" for name, steps in stages.items()}
    ledger = json.loads((workdir / "ledger.json").read_text())
    images = {name: stage["images"] for name, stage in ledger["stages"].items()}
    assert images == {"pixels": 56, "words": 64, "beauty": 144}
    assert json.loads((workdir / "reparameterization.json").read_text())["output_at_500"] < 1e-5
    assert (workdir / "loss.png").exists() and list(workdir.glob("events.out.tfevents.*"))
    # the one stage with more than one
    assert [path.name for path in workdir.glob("buckets-*.png")] == ["buckets-beauty.png"]


def test_the_exported_model_generates_and_records_its_prediction_type(finished):
    from pixart_jax import Pipeline

    pipe = Pipeline.from_pretrained(finished[0] / "model")
    assert pipe.scheduler.prediction == "v"
    assert pipe.transformer.config.position_scale == 2.0
    images = pipe(["a red circle"], steps=2, height=32, width=48)
    assert images.shape == (1, 32, 48, 3)


def test_the_exported_transformer_is_the_average_of_the_last_state(finished):
    from pixart_jax import load_component
    from pixart_jax.weights.table import flatten

    ema = flatten(final_state(finished[0], STEPS)["opt_state"][1]["ema"])
    exported = flatten(load_component(finished[0] / "model" / "transformer").params)
    assert set(ema) == set(exported)
    for path, value in exported.items():
        np.testing.assert_array_equal(value, ema[path], err_msg=path)


def test_the_null_caption_is_the_empty_text_where_the_stage_says_so_and_never_trained(
    finished, world
):
    state = final_state(finished[0], STEPS)
    null = np.asarray(state["params"]["null_caption"])
    np.testing.assert_array_equal(null, state["opt_state"][1]["ema"]["null_caption"])
    task = finished[2][2].task
    (empty,) = task.frozen.text_states([""], 16)
    assert task.null_length == len(empty) == 1
    np.testing.assert_array_equal(null[: len(empty)], empty)
    assert (null[len(empty) :] == 0).all()


def first_stage(world: Path, **changes):
    """The curriculum's first stage alone."""
    config = tiny_run.curriculum(world, **changes)
    return dataclasses.replace(config, stages=config.stages[:1])


@pytest.fixture(scope="module")
def traced(world, tmp_path_factory):
    """(workdir, printed lines) of an uninterrupted run of the first stage, two steps traced."""
    workdir, printed = tmp_path_factory.mktemp("runs") / "first", io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.train(first_stage(world, profile=ProfileConfig((3, 4))), workdir)
    return workdir, printed.getvalue()


def test_a_trace_of_some_steps_is_in_the_workdir(traced):
    workdir, printed = traced
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    assert f"profile of steps 3 to 4: {workdir / 'profile'}" in printed


def test_a_run_cut_off_at_two_of_its_steps_resumes_to_the_same_bits(
    traced, world, tmp_path, monkeypatch
):
    """One stage of seven steps, saved at 3, 6 and 7, in one process. Slow tests kill real ones."""
    workdir = tmp_path / "run"
    # before step 3; resumed at 0, before step 5
    assert tiny_run.train_cut_off(first_stage(world), workdir, monkeypatch, 3, 8) == 3
    assert figures(workdir) == figures(traced[0])
    whole = final_state(traced[0], 7)
    jax.tree.map(np.testing.assert_array_equal, whole, final_state(workdir, 7))
    file = "model/transformer/diffusion_pytorch_model.safetensors"
    assert (workdir / file).read_bytes() == (traced[0] / file).read_bytes()


def test_data_that_changed_between_two_starts_is_named(world, tmp_path, monkeypatch):
    data, workdir = tmp_path / "data", tmp_path / "run"
    config = first_stage(world)
    data_of = dataclasses.replace(config.stages[0].data, source=str(tiny_run.shards(data)))
    stage = dataclasses.replace(config.stages[0], data=data_of, steps=4)
    config = dataclasses.replace(config, stages=(stage,))
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        kill_before(patch, 4)  # the checkpoint of step 3 is written
        train.train(config, workdir)
    shutil.rmtree(data)
    tiny_run.shards(data, count=16)
    with pytest.warns(Notice, match="stage pixels: the files of its data have changed since"):
        train.train(config, workdir)


def start(kill_at: int | str, recipe: Path, workdir: Path, *more: str):
    program = Path(__file__).parent / "train_until_killed.py"
    command = [sys.executable, program, str(kill_at), recipe, "--workdir", workdir, *more]
    env = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=1800, env=env)


def assert_ended_the_same(workdir: Path, whole: Path, how) -> None:
    equal = functools.partial(np.testing.assert_array_equal, err_msg=how)
    jax.tree.map(equal, final_state(whole, STEPS), final_state(workdir, STEPS))
    assert figures(workdir) == figures(whole)
    for name in ("diffusion_pytorch_model", "null_caption"):
        file = f"model/transformer/{name}.safetensors"
        assert (workdir / file).read_bytes() == (whole / file).read_bytes(), how


@pytest.mark.slow
def test_killed_at_random_steps_and_at_a_stage_border_it_ends_the_same_to_the_bit(
    finished, world, tmp_path
):
    workdir, recipe, rng = tmp_path / "run", tiny_run.recipe(world), random.Random()
    kills = [rng.randint(4, 7), None, rng.randint(1, 14), 0]
    for number, kill in enumerate(kills):
        if kill is None:  # the step after the border, wherever the last kill has left the run
            kill = 7 - max(checkpoints(workdir), default=0) + 1
        kills[number] = kill
        done = start(kill, recipe, workdir)
        assert done.returncode == (-9 if kill else 0), (kills, done.stderr[-2000:])
    assert_ended_the_same(workdir, finished[0], f"killed at {kills}")


@pytest.mark.slow
def test_after_a_signal_it_saves_the_step_prints_where_it_is_and_resumes_to_the_same_bits(
    finished, world, tmp_path
):
    workdir, recipe = tmp_path / "run", tiny_run.recipe(world)
    for at, where, saved, more in (
        ("5:SIGTERM", "stage pixels, step 5 of 7", 5, ()),
        ("6:SIGINT", "stage words, step 4 of 8", 11, ("--keep-every", "2")),
    ):
        done = start(at, recipe, workdir, *more)
        assert done.returncode == 75, done.stderr[-2000:]
        line = f"stopped by {at[2:]}: {where} is saved; the same command goes on from there"
        assert done.stderr.splitlines()[-1] == line and "Traceback" not in done.stderr
        assert max(checkpoints(workdir)) == saved
    done = start("2:SIGTERM,SIGTERM", recipe, workdir)
    assert done.returncode == 143 and "stopped at once" in done.stderr
    train.train(tiny_run.curriculum(world, keep_every=2), workdir)
    assert_ended_the_same(workdir, finished[0], "stopped three times")
    kept = checkpoints(workdir)
    # keep-every from its first start on, keep-last below
    assert {12, 14, 16, 18, 20, 22, 24} <= kept and not {5, 7, 11} & kept
    assert [line["total_step"] for line in read(workdir / "attempts.jsonl")] == [0, 5, 11, 11]
    assert read(workdir / "metrics.jsonl")[-1]["restarts"] == 3


@pytest.mark.slow
def test_a_disk_that_is_full_keeps_the_last_save_and_the_same_command_goes_on_once_there_is_space(
    finished, world, tmp_path
):
    """A real one: a small file system in memory, in a user namespace of its own, that grows between
    two starts."""
    unshare = ["unshare", "-rm"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"]).returncode:
        pytest.skip("user namespaces are not allowed here")
    disk = tmp_path / "disk"
    disk.mkdir()
    train_it = f"{sys.executable} train.py {tiny_run.recipe(world)} --workdir {disk / 'run'}"
    script = (
        f"mount -t tmpfs -o size=1200k tmpfs {disk} || exit 99; {train_it}; "
        f"echo status $? saves $(ls {disk}/run/checkpoints); mount -o remount,size=64m {disk}; "
        f"{train_it}; echo status $?; cp -r {disk}/run {tmp_path}/run"
    )
    options = {"capture_output": True, "text": True, "timeout": 1800}
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([*unshare, "bash", "-c", script], **options, env=env)
    if done.returncode == 99:
        pytest.skip("file systems cannot be mounted here")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "could not be written, step 3 is the last save; free some space" in line
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    first, second = [line.split() for line in done.stdout.splitlines() if line.startswith("status")]
    assert first[:4] == ["status", "2", "saves", "3"] and second == ["status", "0"], done.stdout
    assert_ended_the_same(tmp_path / "run", finished[0], "on a full disk")


def test_the_same_command_on_a_finished_run_trains_nothing(finished, world):
    before = figures(finished[0])
    train.train(tiny_run.curriculum(world), finished[0])
    assert figures(finished[0]) == before


def one_line(capsys, status: int, *argv) -> str:
    assert cli.run(train.main, [str(a) for a in argv]) == status
    err = capsys.readouterr().err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_a_checkpoint_cut_short_is_named_and_nothing_is_touched(finished, world, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    last = workdir / "checkpoints" / str(STEPS)
    files = [path for path in (last / "state").rglob("*") if path.is_file()]
    cut = max(files, key=lambda path: path.stat().st_size)
    cut.write_bytes(cut.read_bytes()[:100])
    line = one_line(capsys, 2, tiny_run.recipe(world), "--workdir", workdir)
    assert f"{last} is damaged" in line and "goes on from step 21" in line
    shutil.rmtree(last)  # what the line advises
    train.train(tiny_run.curriculum(world), workdir)
    states = (final_state(folder, STEPS) for folder in (finished[0], workdir))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_loss_that_is_nan_stops_the_run_with_status_1_and_keeps_the_last_save(
    world, tmp_path, capsys
):
    wild = (
        "--stages.0.optimizer.learning-rate 1e30 --stages.0.optimizer.warmup-steps 0 "
        "--checkpoint-every 1 --guard.bad-steps-in-row 4"
    )
    recipe, workdir = tiny_run.recipe(world), tmp_path / "run"
    line = one_line(capsys, 1, recipe, "--workdir", workdir, *wild.split())
    assert "stage pixels, step 5, the last of 4 bad steps in a row: loss is" in line
    assert checkpoints(workdir) == {1}
    bad = read(workdir / "bad_steps.jsonl")
    assert [entry["step"] for entry in bad] == [2, 3, 4, 5]
    assert bad[-1]["keys"][0] in line
    assert all(len(entry["keys"]) == 8 and entry["keys"][0][:3] == "r0-" for entry in bad)


def test_a_record_that_is_nan_costs_its_batches_alone(world, tmp_path):
    """A run on shards with one such record: its batches are skipped and named, all else is
    learned."""
    held = records.Records(world / "square")
    made = [held[index] for index in range(len(held))]
    spoilt, metadata = made[5]
    made[5] = {**spoilt, "mean": np.full_like(spoilt["mean"], np.nan)}, metadata
    folder = tmp_path / "spoilt"
    tiny_sets.shards(folder, {(32, 32): made}, {"source": "random"}, {"dense": 8})
    config = first_stage(world)
    data = dataclasses.replace(config.stages[0].data, source=str(folder))
    stage = dataclasses.replace(config.stages[0], data=data)
    train.train(dataclasses.replace(config, stages=(stage,)), tmp_path / "run")
    lines = read(tmp_path / "run" / "metrics.jsonl")
    bad = read(tmp_path / "run" / "bad_steps.jsonl")
    assert len(lines) == 7 and 2 <= len(bad) <= 3  # 24 records in batches of 8: one batch in three
    assert all("r0-5" in entry["keys"] for entry in bad)
    assert [line["step"] for line in lines if line["skipped"]] == [entry["step"] for entry in bad]
    assert all(np.isfinite(line["loss"]) for line in lines if not line["skipped"])


@pytest.mark.slow
def test_without_another_place_compiled_programs_are_kept_in_the_workdir(world, tmp_path):
    there = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "train.py", tiny_run.recipe(world), "--workdir", tmp_path / "run"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command, env={**there, "JAX_PLATFORMS": "cpu"}, **quiet)
    while first.poll() is None and not read(tmp_path / "run" / "metrics.jsonl"):
        time.sleep(0.1)
    first.kill()
    first.wait()
    assert list((tmp_path / "run" / "compilation_cache").iterdir())


class Noise:
    """Twelve pictures of noise, a caption each."""

    name, caption_kinds = "tfds:noise", ("dense",)
    fingerprint = hashlib.sha256(b"noise").hexdigest()

    def __len__(self):
        return 12

    def sizes(self):
        return np.full((12, 2), 32, np.int32)

    def __getitem__(self, index):
        png = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(png, "PNG")
        return Sample(f"noise-{index}", png.getvalue(), {"dense": ("a red circle left of",)}, -1)


def test_a_source_that_is_not_encoded_is_encoded_first(world, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "open_source", lambda *_, **__: Noise())
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    config = tiny_run.curriculum(world)
    data = DataConfig(source="tfds:noise", buckets=((32, 32),), max_text_tokens=16)
    stage = dataclasses.replace(config.stages[1], start="fresh", steps=2, data=data)
    train.train(dataclasses.replace(config, stages=(stage,)), tmp_path / "run", train.encode)
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 2
    assert list((tmp_path / "cache" / "encoded").glob("*/manifest.json"))

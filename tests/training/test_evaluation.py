"""The loss on held-out records: when, on what, and the same after a crash."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from pixart_jax.commands import train
from pixart_jax.config import EvaluateConfig
from pixart_jax.errors import UserError
from pixart_jax.evaluation import inception
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training import batches, evaluation, run
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.stages import build_stage
from tests.parameters import normal_params
from tests.training import tiny_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_run.curriculum(folder)
    tiny_run.shards(folder / "held_out", count=16)
    return folder


def config(world, **options):
    """The first stage of the small curriculum, with evaluation."""
    whole = tiny_run.curriculum(world, checkpoint_every=3)
    stage = dataclasses.replace(
        whole.stages[0],
        steps=5,
        evaluate=EvaluateConfig(every=2, count=16, source=str(world / "held_out"), **options),
    )
    return dataclasses.replace(whole, stages=(stage,))


def test_the_held_out_loss_is_logged_and_a_crash_changes_no_line(
    world, tmp_path, monkeypatch, capsys
):
    train.train(config(world), tmp_path / "whole")
    held_out = [line for line in tiny_run.figures(tmp_path / "whole") if "evaluate/loss" in line]
    assert [line["step"] for line in held_out] == [2, 4, 5]
    assert all({"evaluate/mse", "evaluate/vb"} <= line.keys() for line in held_out)
    assert len({line["evaluate/loss"] for line in held_out}) == 3
    assert "held-out loss" in capsys.readouterr().out

    log = run.StageHooks.log

    def crash(hooks, step, values):
        log(hooks, step, values)
        if step == 5:
            raise RuntimeError("crash")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
        patch.setattr(run.StageHooks, "log", crash)
        train.train(config(world), tmp_path / "crashed")
    train.train(config(world), tmp_path / "crashed")
    assert tiny_run.figures(tmp_path / "crashed") == tiny_run.figures(tmp_path / "whole")


def test_the_loss_is_the_tasks_on_the_records_with_the_same_noise_each_time(world, tmp_path):
    options, mesh = config(world), make_mesh(config(world).mesh)
    stage, frozen = options.stages[0], Frozen(options, tmp_path)
    parts = build_stage(options, stage, frozen, mesh)
    evaluator = evaluation.open_evaluators(options, 0, parts, frozen, None, mesh)["loss"]
    params = parts.task.on_stage_start(normal_params(parts.task.init))
    state = type("State", (), {"average": params})
    first = evaluator(state)
    assert evaluator(state) == first
    data = dataclasses.replace(stage.data, source=str(world / "held_out"))
    held_out = dataclasses.replace(options, stages=(dataclasses.replace(stage, data=data),))
    loader, expected = batches.open_loader(held_out, 0, frozen, None), []
    losses = jax.jit(parts.task.losses)
    for number in range(16 // stage.batch_size):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number), stage.batch_size)
        batch = {k: v for k, v in loader.batch(number).items() if v.dtype.kind != "U"}
        expected.append(np.mean(losses(params, batch, keys)["loss"]))
    assert first["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def same_states(a, b, total):
    a, b = (jax.tree.leaves(tiny_run.final_state(place, total)) for place in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def small_features(monkeypatch):
    """FID of means instead of Inception's features, which take seconds an image."""

    class Means:
        def features(self, images):
            return images.astype("f4").reshape(len(images), 16, -1).mean(-1)

    monkeypatch.setattr(inception, "random", lambda seed: Means())


def measured(world, **options):
    """The second stage of the curriculum alone, 4 steps; and a config of other stages."""
    whole = tiny_run.curriculum(world, checkpoint_every=2)
    preview = dataclasses.replace(whole.preview, steps=2)
    plain = dataclasses.replace(whole.stages[1], steps=4, start="fresh")
    evaluate = EvaluateConfig(2, ("loss", "fid"), 8, inception="random:0", split="train", **options)
    stage = dataclasses.replace(plain, evaluate=evaluate)
    return plain, stage, lambda *stages: dataclasses.replace(whole, stages=stages, preview=preview)


def test_metrics_of_images_change_no_parameter_and_a_stage_ends_below_a_limit(
    world, tmp_path, small_features, capsys
):
    plain, stage, config = measured(world, stop_below=100.0)
    train.train(config(plain), tmp_path / "plain")
    train.train(config(stage), tmp_path / "measured", None, train.open_metric)
    assert same_states(tmp_path / "plain", tmp_path / "measured", 2)
    assert "ends at step 2" in capsys.readouterr().out
    assert not (tmp_path / "measured" / "checkpoints" / "4").exists()
    lines = tiny_run.figures(tmp_path / "measured")
    (line,) = [line for line in lines if "evaluate/fid" in line]
    assert line["step"] == 2 and 0 < line["evaluate/fid"] < np.inf and "evaluate/loss" in line


@pytest.mark.slow
def test_a_run_goes_on_after_a_stage_that_ended_early(world, tmp_path, small_features):
    plain, stage, config = measured(world, stop_below=100.0)
    second = dataclasses.replace(plain, name="second", steps=1, start="previous")

    def run():
        train.train(config(stage, second), tmp_path / "run", None, train.open_metric)
        return tiny_run.figures(tmp_path / "run")

    lines = run()
    assert [line["total_step"] for line in lines if line["stage"] == "second"] == [5]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "5")  # killed in the second stage
    assert run() == lines
    shutil.rmtree(tmp_path / "run" / "model")
    assert run() == lines and (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": -1}, "EvaluateConfig.every = -1: must not be negative"),
        ({"count": 0}, "EvaluateConfig.count = 0: must be at least 1"),
        ({"metrics": ("fdi",)}, "some of loss, shapes, fid and clip"),
        ({"metrics": ("fid",)}, "fid needs Inception's weights"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        EvaluateConfig(**options)


def test_a_source_without_a_test_split_is_named_before_the_first_step(world, tmp_path):
    whole = config(world)
    stage = dataclasses.replace(whole.stages[0], evaluate=EvaluateConfig(every=1, source="no/such"))
    with pytest.raises(UserError, match="stage pixels: unknown source 'no/such'"):
        train.train(dataclasses.replace(whole, stages=(stage,)), tmp_path)

"""Training a ControlNet: it begins as the base, to the bit, and a run trains and stores nothing
else."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_run
from tasks.test_lora import (
    check_kills,
    check_two_devices,
    digests,
    error_of,
    final_state,
    over_base,
)
from tiny_run import figures

from pixart_jax import load_component
from pixart_jax.commands import train
from pixart_jax.config import Config, DataConfig, LoraConfig, ObjectiveConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.controlnet import ControlledTransformer
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.training.tasks.controlnet import OFFICIAL, TextToImageControl
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.training.tasks.text_to_image import TextToImage
from pixart_jax.weights.files import open_tensors
from pixart_jax.weights.table import flatten
from tests import tiny_diffusers

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Encoded shards with conditions in ``edges``, and a model of diffusers in ``base``."""
    folder = tmp_path_factory.mktemp("world")
    tiny_run.curriculum(folder)
    tiny_run.shards(folder / "edges", condition="canny")
    tiny_diffusers.build(folder / "base")
    return folder


def a_run(world: Path, dtype: str = "float32", **changes) -> Config:
    """:func:`over_base` of the task. changes: of the data."""
    data = tiny_run.curriculum(world).stages[1].data
    changes = {"source": str(world / "edges"), "condition": "canny", **changes}
    config = over_base(world, task="controlnet", data=dataclasses.replace(data, **changes))
    return dataclasses.replace(config, compute_dtype=dtype, remat="full")


def test_it_begins_as_the_base_and_only_the_last_projections_have_a_gradient(world):
    base = load_component(world / "base" / "transformer")
    objective = DiffusionObjective(ObjectiveConfig(), 0.5)
    module = ControlledTransformer(base.config, remat="full", units=1)
    stage = a_run(world).stages[0]
    task = TextToImageControl(module, objective, None, 0, stage)
    plain = TextToImage(PixArtTransformer(base.config, remat="full"), objective, None, 0, stage)
    params = {**base.params, "null_caption": jnp.ones((120, 16))}
    tree = task.on_stage_start(nn.unbox(jax.jit(task.init)(jax.random.key(0))), params)
    for path, value in flatten(tree["controlnet"]["units"]["block"]).items():
        np.testing.assert_array_equal(value, flatten(base.params["blocks"])[path][:1])
    rng = np.random.default_rng(0)
    posterior = rng.uniform(0.1, 1, size=(4, 3, 4, 6, 4)).astype(np.float32)
    batch = dict(zip(("mean", "std", "control_mean", "control_std"), posterior))
    batch |= {"text_states": rng.normal(size=(3, 5, 16)).astype(np.float32)}
    batch |= {"text_lengths": np.array([5, 1, 3]), "size": None, "aspect_ratio": None}
    keys = jax.random.split(jax.random.key(1), 3)

    def loss(tree):
        losses = task.losses(tree, batch, keys, params)
        return losses["loss"].mean(), losses

    gradient, losses = jax.jit(jax.grad(loss, has_aux=True))(tree)
    np.testing.assert_array_equal(
        losses["loss"], jax.jit(plain.losses)(params, batch, keys)["loss"]
    )
    for path, value in flatten(gradient["controlnet"]).items():
        moves = path.startswith("units/after/")
        assert (np.abs(value).max() > 0) == moves, path


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> Path:
    """A run in bfloat16, over fp32 masters."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    before = digests(world / "base")
    train.train(a_run(world, "bfloat16"), workdir)
    assert digests(world / "base") == before
    return workdir


def test_a_run_stores_the_control_alone_and_exports_both_layouts(finished, world):
    state = final_state(finished)
    assert list(state["params"]) == ["controlnet"]
    leaves = jax.tree.leaves(state["params"])
    assert all(leaf.dtype == np.float32 for leaf in leaves)
    held = sum(np.size(leaf) for leaf in jax.tree.leaves(state))
    assert held < 4 * sum(map(np.size, leaves)) + 10  # two moments, the average, counters
    # the copies began as the base in fp32, and moved with the projections
    tree, base = state["params"]["controlnet"], load_component(world / "base" / "transformer")
    kernel = base.params["blocks"]["attn"]["q"]["kernel"][:1]
    moved = np.abs(np.asarray(tree["units"]["block"]["attn"]["q"]["kernel"]) - kernel).max()
    assert 0 < moved < 0.1 and np.abs(tree["units"]["after"]["kernel"]).max() > 1e-3
    part = load_component(finished / "adapter")
    average = state["opt_state"][1]["ema"]["controlnet"]
    jax.tree.map(np.testing.assert_array_equal, dict(part.params), dict(average))
    official = open_tensors(finished / "adapter" / OFFICIAL)
    assert len(official) == 19
    np.testing.assert_array_equal(
        official["controlnet.0.after_proj.weight"],
        np.asarray(average["units"]["after"]["kernel"][0]).T,
    )
    assert (finished / "samples" / "words-0000007.png").exists()
    assert "loss" in {key for line in figures(finished) for key in line}


def test_a_stage_may_go_on_from_a_trained_one_to_the_bit(finished, world, tmp_path):
    config = a_run(world)
    stage = dataclasses.replace(config.stages[0], controlnet=str(finished / "adapter"), steps=0)
    train.train(dataclasses.replace(config, stages=(stage,)), tmp_path / "run")
    for file in (finished / "adapter").iterdir():
        assert (tmp_path / "run" / "adapter" / file.name).read_bytes() == file.read_bytes()
    for path, message in (
        (world / "base" / "transformer", "a ControlNet is needed"),
        (tmp_path / "nowhere", "nowhere"),
        (ROOT / "assets" / "shapes_control", "a ControlNet of width 128 does not fit"),
    ):
        wrong = dataclasses.replace(stage, controlnet=str(path))
        wrong = dataclasses.replace(config, stages=(wrong,))
        assert message in error_of(wrong, tmp_path / "wrong")
    with pytest.raises(UserError, match="only task controlnet continues one"):
        StageConfig("s", controlnet="there")


@pytest.mark.slow
def test_killed_by_the_system_it_ends_the_same_to_the_bit(finished, world, tmp_path):
    check_kills(a_run(world, "bfloat16"), finished, tmp_path / "run")
    for file in (finished / "adapter").iterdir():
        assert (tmp_path / "run/adapter" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_two_devices_compute_what_one_does(world):
    check_two_devices("test_controlnet", world)


def test_mistakes_are_one_line(world, tmp_path):
    square = dataclasses.replace(a_run(world), name="square")
    data = dataclasses.replace(square.stages[0].data, source=str(world / "square"))
    stages = (dataclasses.replace(square.stages[0], data=data),)
    message = "holds no conditions: encode it with --condition canny"
    assert message in error_of(dataclasses.replace(square, stages=stages), tmp_path)
    stage = dataclasses.replace(square.stages[0], data=DataConfig(condition="canny"))
    for changes, message in (
        ({"data": DataConfig()}, "a ControlNet needs conditions"),
        ({"start": "previous"}, "a ControlNet needs the folder or hub id"),
        ({"lora": LoraConfig()}, "lora adapts a text_to_image model"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(stage, **changes)
    with pytest.raises(UserError, match="start 'previous' is an adapter"):
        Config("c", (stage, StageConfig("next")))

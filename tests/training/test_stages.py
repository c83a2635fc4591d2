"""A plan is of the very program that a run executes."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from training import tiny_run

from pixart_jax.config import Config, MeshConfig, StageConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.parallel.rules import batch_sharding
from pixart_jax.training import stages
from pixart_jax.training.batches import open_loader, put
from pixart_jax.training.frozen import Frozen, FrozenSpec
from pixart_jax.training.step import compiled_step


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, tiny_run.curriculum(folder)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_step_from_shapes_alone_is_the_runs_to_the_letter(world, index):
    """Stage 1, stage 2 with CAME, stage 3 with micro-batches: the lowered text of both; the run's
    batch is a real one."""
    folder, config = world
    mesh, stage = make_mesh(MeshConfig(), jax.devices()[:1]), config.stages[index]
    frozen = Frozen(config, folder)
    parts = stages.build_stage(config, stage, frozen, mesh)
    rows = open_loader(config, index, frozen, None, mesh).batch(0)
    batch = put(rows, batch_sharding(mesh))
    real = compiled_step(config, stage, parts, mesh).trace(parts.abstract, batch, jax.random.key(0))

    bucket = tuple(8 * n for n in batch["mean"].shape[1:3])
    texts = batch["text_states"].shape[1] if "text_states" in batch else stage.data.max_text_tokens
    stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, max_text_tokens=texts))
    made = stages.build_stage(config, stage, FrozenSpec(config), mesh)
    shapes = stages.abstract_batch(config, stage, bucket, mesh)
    assert {name: (s.shape, s.dtype) for name, s in shapes.items()} == {
        name: (a.shape, a.dtype) for name, a in batch.items()
    }
    step = compiled_step(config, stage, made, mesh)
    planned = step.trace(made.abstract, shapes, stages.abstract_key(mesh))
    assert planned.lower().as_text() == real.lower().as_text()


def test_what_is_assumed_of_absent_folders_is_said():
    absent = {"vae": "models/none", "text_encoder": "models/none"}
    config = Config("none", (StageConfig("words"),), model=tiny_run.MODEL, **absent)
    frozen = FrozenSpec(config)
    assert frozen.vae_config.scaling_factor == 0.18215 and len(frozen.text_states([""], 8)[0]) == 1
    assert len(frozen.assumptions) == 2 and "0.18215" in frozen.assumptions[0]

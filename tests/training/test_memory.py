"""remat "auto": the fastest policy, by measurement, whose step fits the device by count."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from training import tiny_run

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.models.remat import BY_SPEED, policy
from pixart_jax.parallel.chips import CHIPS, GIB
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training import memory, recipes, stages
from pixart_jax.training.frozen import Frozen, FrozenSpec
from pixart_jax.training.step import compiled_step

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def parts(config, mesh):
    return stages.build_stage(config, config.stages[0], FrozenSpec(config), mesh)


def needed(config, made, mesh, name):
    stage, held = config.stages[0], memory.bytes_per_device
    parameters = held(made.abstract.params)
    axes, bucket = dict(mesh.shape), stage.data.buckets[0]
    terms = memory.activation_bytes(config, stage, name, axes, bucket, "cpu", parameters)
    return held(made.abstract) + 1.2 * sum(terms.values())


def test_the_order_is_that_of_the_measured_table():
    row = r"pixart_jax remat (\w+) \| ([\d.]+) \| [\d.]+ \| [\d.]+ \|"
    rows = re.findall(row, BENCHMARKS.read_text())
    seconds = {name: float(median) for name, median in rows}
    assert sorted(BY_SPEED, key=seconds.get) == list(BY_SPEED)


def test_the_fastest_that_fits_is_taken_and_the_smallest_where_none_does(mesh, monkeypatch):
    config = recipes.load(recipes.find("xl2_256_sam"))
    stage = dataclasses.replace(config.stages[0], batch_size=64)
    config = dataclasses.replace(config, remat="auto", stages=(stage,))
    made = parts(config, mesh)
    sizes = [needed(config, made, mesh, name) for name in BY_SPEED]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    for name, size in zip(BY_SPEED, sizes, strict=True):
        monkeypatch.setattr(memory, "usable_bytes", lambda device, size=size: size + 1.0)
        found = parts(config, mesh)
        assert found.remat.name == name and "the fastest that fits" in str(found.remat)
        assert found.task.module.remat == name
    monkeypatch.setattr(memory, "usable_bytes", lambda device: sizes[-1] - 1.0)
    assert str(parts(config, mesh).remat).startswith("remat full, the smallest, which may not fit")
    monkeypatch.setattr(memory, "usable_bytes", lambda device: None)
    unknown = "remat full: what this stage takes, or what its device has, is not known"
    assert str(parts(config, mesh).remat) == unknown
    assert parts(dataclasses.replace(config, remat="dots"), mesh).remat is None


def test_what_a_program_may_have_of_a_device(monkeypatch):
    def device(platform, kind):
        return SimpleNamespace(platform=platform, device_kind=kind)

    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    usable = memory.usable_bytes
    assert usable(device("tpu", "TPU v5e")) == CHIPS["v5e"].usable_bytes == 15.75 * GIB
    assert usable(device("gpu", "NVIDIA H200")) == 0.75 * 141e9
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.98")
    assert usable(device("gpu", "NVIDIA H200")) == CHIPS["h200"].usable_bytes
    assert usable(device("gpu", "NVIDIA A100")) is None and usable(device("tpu", "TPU v9")) is None
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert usable(jax.devices()[0]) == 0.8 * whole / jax.local_device_count()


def test_the_step_of_auto_is_that_of_the_policy_it_names(tmp_path, mesh):
    config = dataclasses.replace(tiny_run.curriculum(tmp_path), remat="auto")
    stage = config.stages[0]

    def build(remat):
        changed = dataclasses.replace(config, remat=remat)
        made = stages.build_stage(changed, stage, Frozen(changed, tmp_path), mesh)
        shapes = stages.abstract_batch(changed, stage, stage.data.buckets[0], mesh)
        step = compiled_step(changed, stage, made, mesh)
        traced = step.trace(made.abstract, shapes, stages.abstract_key(mesh))
        return made.remat, traced.lower().as_text()

    choice, auto = build("auto")
    assert str(choice).startswith("remat dots_attention, the fastest that fits: by count 0.")
    assert build("dots_attention") == (None, auto) and build("full")[1] != auto


def test_auto_is_not_a_policy_of_a_model_and_a_mistyped_one_is_corrected():
    with pytest.raises(UserError, match="name one of none, full"):
        policy("auto")
    with pytest.raises(UserError, match="did you mean 'auto'"):
        policy("aut")

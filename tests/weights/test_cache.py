"""The cache of converted weights: the second load converts nothing, and a changed model is not read
from it."""

from __future__ import annotations

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import load_component
from pixart_jax.weights import base, cache
from pixart_jax.weights.streaming import read
from pixart_jax.weights.table import flatten


@pytest.fixture
def folder(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SMALLEST", 0)
    return shutil.copytree(tiny_model / "transformer", tmp_path / "model" / "transformer")


@pytest.fixture
def conversions(monkeypatch):
    """A list with an entry for each time that weights were converted."""
    calls = []
    monkeypatch.setattr(base, "read", lambda *a, **k: calls.append(1) or read(*a, **k))
    return calls


def assert_same(ours, others):
    assert jax.tree.structure(ours.params) == jax.tree.structure(others.params)
    for path, array in flatten(ours.params).items():
        np.testing.assert_array_equal(array, flatten(others.params)[path])
        assert array.dtype == flatten(others.params)[path].dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_second_opening_converts_nothing_and_gives_the_same(
    folder, tmp_path, conversions, dtype
):
    plain = load_component(folder, dtype)
    first, second = (load_component(folder, dtype, cache=tmp_path / "kept") for _ in range(2))
    assert len(conversions) == 2
    assert_same(first, plain)
    assert_same(second, plain)


def test_each_dtype_has_its_own_file_and_a_changed_model_replaces_it(folder, tmp_path, conversions):
    kept = tmp_path / "kept"
    for dtype in (jnp.float32, jnp.bfloat16):
        load_component(folder, dtype, cache=kept)
    assert len(list(kept.iterdir())) == 2
    weights = folder / "diffusion_pytorch_model.safetensors"
    changed = load_component(folder)
    changed.replace(params=jax.tree.map(lambda leaf: leaf + 1, changed.params)).save(folder)
    os.utime(weights, ns=(1, 1))  # a change that the clock may be too coarse to show
    conversions.clear()
    assert_same(load_component(folder, cache=kept), load_component(folder))
    assert len(conversions) == 2 and len(list(kept.iterdir())) == 2


def test_a_damaged_file_is_named_and_made_anew(folder, tmp_path, conversions, capsys):
    load_component(folder, cache=tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert_same(load_component(folder, cache=tmp_path / "kept"), load_component(folder))
    assert str(path) in (err := capsys.readouterr().err) and "made anew" in err
    conversions.clear()
    load_component(folder, cache=tmp_path / "kept")
    assert not conversions


def test_a_small_model_is_not_kept(tiny_model, tmp_path):
    load_component(tiny_model / "transformer", cache=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_full_disk_is_told_and_the_model_opens(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    load_component(folder, cache=tmp_path / "kept")
    assert "are free there" in capsys.readouterr().err and not list((tmp_path / "kept").iterdir())

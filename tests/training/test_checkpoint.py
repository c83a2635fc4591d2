"""Saves: what is restored is what was saved, and what is damaged is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.training import checkpoint
from pixart_jax.training.checkpoint import Checkpoints, Place
from pixart_jax.training.state import TrainState


@jax.jit
def make(seed):
    key = jax.random.key(seed)
    params = {"w": jax.random.normal(key, (64, 32)), "half": jax.random.normal(key, (40,)).astype(jnp.bfloat16)}
    return TrainState(jnp.int32(3) * seed, params, ({"count": jnp.int32(7)},))


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(1))


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Saves of steps 1, 2 and 3 of a run that keeps two; the state is donated away right after each."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 1, state), donate_argnums=0)
    with Checkpoints(folder, keep=2) as saves:
        for total in (1, 2, 3):
            state = make(total)
            saves.save(Place(0, total, total, {"a": {"seconds": 1.5}}, {"sums": {"loss": 0.1}, "count": 1}, {"next_index": total}), state)
            jax.block_until_ready(spoil(state))
    return folder


def test_restored_is_what_was_saved_though_its_memory_was_given_away(saved):
    with Checkpoints(saved, keep=2) as saves:
        assert saves.latest() == 3
        place = saves.place(3)
        assert place == Place(0, 3, 3, {"a": {"seconds": 1.5}}, {"sums": {"loss": 0.1}, "count": 1}, {"next_index": 3})
        assert_equal(saves.restore(3, abstract()), make(3))


def test_only_the_newest_are_kept(saved):
    assert sorted(path.name for path in saved.iterdir() if path.name.isdigit()) == ["2", "3"]


def damage_nothing_silently(folder: Path, spoil, copy: Path):
    """Each file of the newest save, one at a time: opening it gives the very state, or a UserError that names the save."""
    named, unharmed = [], []
    for path in sorted(p for p in (folder / "3").rglob("*") if p.is_file()):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        relative = path.relative_to(folder)
        spoil(copy / relative)
        try:
            with Checkpoints(copy, keep=2) as saves:
                assert saves.latest() == 3
                saves.place(3)
                assert_equal(saves.restore(3, abstract()), make(3))
            unharmed.append(str(relative))
        except UserError as fault:
            assert str(copy / "3") in str(fault) and "goes on from step 2" in str(fault) and "\n" not in str(fault)
            named.append(str(relative))
    return named, unharmed


def cut_short(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


MARKS = {"3/commit_success.txt", "3/_CHECKPOINT_METADATA", "3/files.json"}  # without these all is still there


@pytest.mark.parametrize("spoil", [cut_short, flip, Path.unlink])
def test_a_damaged_save_is_named_and_never_skipped(saved, tmp_path, spoil, capfd):
    named, unharmed = damage_nothing_silently(saved, spoil, tmp_path / "copy")
    assert set(unharmed) <= MARKS and len(named) > 10
    assert ("3/files.json" in unharmed) == (spoil is Path.unlink)
    assert "Traceback" not in capfd.readouterr().err


def test_an_altered_bit_in_a_large_file_is_found_by_the_arrays_sums(saved, tmp_path, monkeypatch):
    """Files over _SMALL bytes are listed without a checksum; here all are."""
    monkeypatch.setattr(checkpoint, "_SMALL", -1)
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    listed = json.loads((copy / "3" / "files.json").read_text())
    (copy / "3" / "files.json").write_text(json.dumps({name: [size, None] for name, (size, _) in listed.items()}))
    flip(max((copy / "3" / "state").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()))
    with Checkpoints(copy, keep=2) as saves, pytest.raises(UserError, match="differ from what was saved.*params/w"):
        saves.restore(3, abstract())


def test_a_save_that_is_an_empty_folder_is_named(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    shutil.rmtree(copy / "3")
    (copy / "3").mkdir()
    with Checkpoints(copy, keep=2) as saves, pytest.raises(UserError, match="3 is damaged"):
        saves.place(saves.latest())

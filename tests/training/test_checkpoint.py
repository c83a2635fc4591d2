"""Checkpoints: what is restored is what was saved, and what is damaged is named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.commands import launch
from pixart_jax.errors import UserError
from pixart_jax.training import checkpoint
from pixart_jax.training.bad_steps import StepGuard
from pixart_jax.training.checkpoint import Checkpointer, RunPosition
from pixart_jax.training.state import TrainState


@jax.jit
def make(seed):
    key = jax.random.key(seed)
    params = {
        "w": jax.random.normal(key, (64, 32)),
        "half": jax.random.normal(key, (40,)).astype(jnp.bfloat16),
    }
    return TrainState(jnp.int32(3) * seed, params, ({"count": jnp.int32(7)},))


def abstract(state=None):
    state = make(1) if state is None else state
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def at(total: int) -> RunPosition:
    cost, window = {"a": {"seconds": 1.5}}, {"sums": {"loss": 0.1}, "count": 1}
    return RunPosition(0, total, total, cost, window, {"next_index": total})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Steps 1, 2 and 3 of a run that keeps two; the state is donated away right after each."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 1, state), donate_argnums=0)
    with Checkpointer(folder, keep=2) as checkpoints:
        for total in (1, 2, 3):
            state = make(total)
            checkpoints.save(at(total), state)
            jax.block_until_ready(spoil(state))
    return folder


def test_restored_is_what_was_saved_though_its_memory_was_given_away(saved):
    with Checkpointer(saved, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        assert checkpoints.position(3) == at(3)
        assert_equal(checkpoints.restore(3, abstract()), make(3))


def test_only_the_newest_are_kept(saved):
    assert sorted(path.name for path in saved.iterdir() if path.name.isdigit()) == ["2", "3"]


def cut_short(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("spoil", [cut_short, flip, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_never_skipped(saved, tmp_path, spoil):
    """Each file of the newest one, one at a time: opening it gives the very state, or a UserError
    that names the checkpoint."""
    named, copy = 0, tmp_path / "copy"
    for path in sorted(p for p in (saved / "3").rglob("*") if p.is_file()):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(saved, copy)
        spoil(copy / path.relative_to(saved))
        try:
            with Checkpointer(copy, keep=2) as checkpoints:
                assert checkpoints.latest() == 3
                checkpoints.position(3)
                assert_equal(checkpoints.restore(3, abstract()), make(3))
        except UserError as error:
            text, named = str(error), named + 1
            assert str(copy / "3") in text and "goes on from step 2" in text and "\n" not in text
    assert named >= 6  # whatever is not named gave the very state


def test_an_altered_bit_of_an_array_or_of_the_position_is_found(saved, tmp_path, monkeypatch):
    """In what Orbax reads without complaint: an array's values, a number of the position."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (file,) = (copy / "3" / "place").rglob("metadata")
    file.write_text(file.read_text().replace("1.5", "1.7"))
    with Checkpointer(copy, keep=2) as checkpoints:
        with pytest.raises(UserError, match="position differs"):
            checkpoints.position(3)
    sums = checkpoint._sums
    monkeypatch.setattr(checkpoint, "_sums", lambda tree: sums(tree) | {"params/w": 0})
    with Checkpointer(saved, keep=2) as checkpoints:
        with pytest.raises(UserError, match="1 arrays differ from what was saved.*params/w"):
            checkpoints.restore(3, abstract())


def test_a_checkpoint_that_is_an_empty_folder_is_named(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "3")
    (tmp_path / "copy" / "3").mkdir()
    with Checkpointer(tmp_path / "copy", keep=2) as checkpoints:
        with pytest.raises(UserError, match="3 is damaged"):
            checkpoints.position(checkpoints.latest())


def test_checkpoints_at_multiples_of_every_stay_for_good_beside_the_newest(tmp_path):
    with Checkpointer(tmp_path, keep=2, every=4) as checkpoints:
        for total in (1, 4, 5, 8, 9, 11):
            checkpoints.save(RunPosition(0, total, total), make(total))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 8, 9, 11]
    with Checkpointer(tmp_path, keep=1) as checkpoints:  # without the option they are as others
        checkpoints.save(RunPosition(0, 12, 12), make(12))
    assert [path.name for path in tmp_path.iterdir()] == ["12"]


GUARD = StepGuard(jnp.int32(3), jnp.int32(2), jnp.int32(40), jnp.float32(0.1), jnp.float32(1 / 3))


def guarded(total: int, guard: StepGuard = GUARD) -> TrainState:
    return dataclasses.replace(make(total), guard=guard)


def test_errors_are_asked_for_only_while_nothing_is_written(tmp_path, monkeypatch):
    """Orbax's check_for_errors can deadlock during a write."""

    def fail():
        raise RuntimeError("No space left on device")

    with Checkpointer(tmp_path, keep=1) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "check_for_errors", fail)
        monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: True)
        checkpoints.check()
        monkeypatch.setattr(checkpoints._manager, "is_saving_in_progress", lambda: False)
        with pytest.raises(UserError, match="the disk is full"):
            checkpoints.check()
        monkeypatch.undo()


def test_the_guard_is_restored_and_begins_afresh_where_none_was_saved(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(RunPosition(0, 1, 1), guarded(1))
        checkpoints.save(RunPosition(0, 2, 2), make(2))
        checkpoints.wait()
        for total, guard in ((1, GUARD), (2, StepGuard.fresh())):
            restored = checkpoints.restore(total, abstract(guarded(1)))
            assert_equal(restored, guarded(total, guard))
            assert restored.guard.skipped.dtype == jnp.int32


def test_a_checkpoint_of_an_older_version_opens(tmp_path):
    """Its position had no checksum, and two of the guard's numbers had other names."""
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        checkpoints.save(at(1), guarded(1))
    place, sums = (tmp_path / "1" / name / "metadata" for name in ("place", "sums"))
    text = place.read_text().replace('"consecutive"', '"in_row"').replace('"accepted"', '"good"')
    place.write_text(text)
    old = json.loads(sums.read_text())
    del old[checkpoint.POSITION_SUM]
    sums.write_text(json.dumps(old))
    with Checkpointer(tmp_path, keep=2) as checkpoints:
        assert checkpoints.position(1).cost == at(1).cost
        assert_equal(checkpoints.restore(1, abstract(guarded(1))), guarded(1))


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(saved):
    shapes = {"w": (64, 48), "extra": (5,)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    other = dataclasses.replace(abstract(), params=params)
    with Checkpointer(saved, keep=2) as checkpoints, pytest.raises(UserError) as error:
        checkpoints.restore(3, other)
    text = str(error.value)
    assert "3 is of another model: " in text and "\n" not in text and "and 1 more" in text
    assert "params/half is [40] bfloat16 there and absent here" in text
    assert "params/w is [64, 32] float32 there and [64, 48] float32 here" in text


def on_mesh(devices: int, *arguments) -> subprocess.Popen:
    """checkpoint_on_meshes.py on this many simulated devices."""
    environment = {**os.environ, "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    program = Path(__file__).parent / "checkpoint_on_meshes.py"
    command = [sys.executable, program, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def assert_opens(process: subprocess.Popen, devices: int) -> None:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    assert out.split()[-2:] == [str(devices), "equal"]


@pytest.mark.slow
def test_a_checkpoint_opens_on_fewer_devices_with_the_same_bits(tmp_path):
    """Eight simulated devices write, four and one read and write again."""
    for devices, fsdp in ((8, 4), (4, 2), (1, 1)):
        assert_opens(on_mesh(devices, tmp_path, fsdp), devices)


@pytest.mark.slow
def test_two_processes_save_together_and_one_opens_it(tmp_path):
    """Each holds half of every array; the sums are those of the whole."""
    address = f"localhost:{launch.free_port()}"
    for process in [on_mesh(2, tmp_path, 2, address, k) for k in range(2)]:
        assert_opens(process, 4)
    assert_opens(on_mesh(1, tmp_path, 1), 1)

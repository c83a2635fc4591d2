"""Saves: what is restored is what was saved, and what is damaged is named."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(1)
    )


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def at(total: int) -> RunPosition:
    cost, window = {"a": {"seconds": 1.5}}, {"sums": {"loss": 0.1}, "count": 1}
    return RunPosition(0, total, total, cost, window, {"next_index": total})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Saves of steps 1, 2 and 3 of a run that keeps two; the state is donated away right after
    each."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 1, state), donate_argnums=0)
    with Checkpointer(folder, keep=2) as saves:
        for total in (1, 2, 3):
            state = make(total)
            saves.save(at(total), state)
            jax.block_until_ready(spoil(state))
    return folder


def test_restored_is_what_was_saved_though_its_memory_was_given_away(saved):
    with Checkpointer(saved, keep=2) as saves:
        assert saves.latest() == 3
        assert saves.position(3) == at(3)
        assert_equal(saves.restore(3, abstract()), make(3))


def test_only_the_newest_are_kept(saved):
    assert sorted(path.name for path in saved.iterdir() if path.name.isdigit()) == ["2", "3"]


def damage_nothing_silently(folder: Path, spoil, copy: Path):
    """Each file of the newest save, one at a time: opening it gives the very state, or a UserError
    that names the save."""
    named, unharmed = [], []
    for path in sorted(p for p in (folder / "3").rglob("*") if p.is_file()):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        relative = path.relative_to(folder)
        spoil(copy / relative)
        try:
            with Checkpointer(copy, keep=2) as saves:
                assert saves.latest() == 3
                saves.position(3)
                assert_equal(saves.restore(3, abstract()), make(3))
            unharmed.append(str(relative))
        except UserError as fault:
            assert (
                str(copy / "3") in str(fault)
                and "goes on from step 2" in str(fault)
                and "\n" not in str(fault)
            )
            named.append(str(relative))
    return named, unharmed


def cut_short(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("spoil", [cut_short, flip, Path.unlink])
def test_a_damaged_save_is_named_and_never_skipped(saved, tmp_path, spoil):
    named, unharmed = damage_nothing_silently(saved, spoil, tmp_path / "copy")
    assert len(named) >= 6  # whatever is not named gave the very state


def test_an_altered_bit_of_an_array_or_of_the_position_is_found(saved, tmp_path):
    """In what Orbax reads without complaint: an array's values, a number of the position."""
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (file,) = (copy / "3" / "place").rglob("metadata")
    file.write_text(file.read_text().replace("1.5", "1.7"))
    with Checkpointer(copy, keep=2) as saves, pytest.raises(UserError, match="position differs"):
        saves.position(3)
    with pytest.MonkeyPatch.context() as patch, Checkpointer(saved, keep=2) as saves:
        sums = checkpoint._sums
        patch.setattr(checkpoint, "_sums", lambda tree: sums(tree) | {"params/w": 0})
        with pytest.raises(UserError, match="1 arrays differ from what was saved.*params/w"):
            saves.restore(3, abstract())


def test_a_save_that_is_an_empty_folder_is_named(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    shutil.rmtree(copy / "3")
    (copy / "3").mkdir()
    with Checkpointer(copy, keep=2) as saves, pytest.raises(UserError, match="3 is damaged"):
        saves.position(saves.latest())


def test_saves_at_multiples_of_every_stay_for_good_beside_the_newest(tmp_path):
    with Checkpointer(tmp_path, keep=2, every=4) as saves:
        for total in (1, 4, 5, 8, 9, 11):
            saves.save(RunPosition(0, total, total), make(total))
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [4, 8, 9, 11]
    with Checkpointer(tmp_path, keep=1) as saves:  # without the option they are saves as others are
        saves.save(RunPosition(0, 12, 12), make(12))
    assert [path.name for path in tmp_path.iterdir()] == ["12"]


def test_what_the_guard_counts_is_saved_and_a_save_of_an_older_version_begins_it_anew(tmp_path):
    counted = StepGuard(
        jnp.int32(3), jnp.int32(2), jnp.int32(40), jnp.float32(0.1), jnp.float32(1 / 3)
    )
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), StepGuard.fresh()
    )
    wanted = dataclasses.replace(abstract(), guard=shapes)
    with Checkpointer(tmp_path, keep=2) as saves:
        saves.save(RunPosition(0, 1, 1), dataclasses.replace(make(1), guard=counted))
        saves.save(RunPosition(0, 2, 2), make(2))  # as before there were guards
        saves.wait()
        for total, guard in ((1, counted), (2, StepGuard.fresh())):
            restored = saves.restore(total, wanted)
            for a, b in zip(
                jax.tree.leaves(restored),
                jax.tree.leaves(dataclasses.replace(make(total), guard=guard)),
                strict=True,
            ):
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_a_save_of_another_model_is_refused_with_what_differs(saved):
    params = {
        "w": jax.ShapeDtypeStruct((64, 48), jnp.float32),
        "extra": jax.ShapeDtypeStruct((5,), jnp.float32),
    }
    other = dataclasses.replace(abstract(), params=params)
    with Checkpointer(saved, keep=2) as saves, pytest.raises(UserError) as fault:
        saves.restore(3, other)
    said = str(fault.value)
    assert "3 is of another model: " in said and "\n" not in said and "and 1 more" in said
    assert (
        "params/half is [40] bfloat16 there and absent here" in said
        and "params/w is [64, 32] float32 there and [64, 48] float32 here" in said
    )


@pytest.mark.slow
def test_a_save_opens_on_fewer_devices_with_the_same_bits(tmp_path):
    """Eight simulated devices write, four and one read and write again."""
    program = Path(__file__).parent / "checkpoint_on_meshes.py"
    for devices, fsdp in ((8, 4), (4, 2), (1, 1)):
        done = subprocess.run(
            [sys.executable, program, tmp_path, str(fsdp)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.split() == [str(devices), "equal"]


@pytest.mark.slow
def test_two_processes_save_together_and_one_opens_it(tmp_path):
    """Each holds half of every array; the sums are those of the whole."""
    program = Path(__file__).parent / "checkpoint_on_meshes.py"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    pair = [
        subprocess.Popen([sys.executable, program, tmp_path, "2", address, str(k)], **pipes)
        for k in range(2)
    ]
    for process in pair:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        assert out.split()[-2:] == ["4", "equal"]
    alone = subprocess.run(
        [sys.executable, program, tmp_path, "1"], capture_output=True, text=True, timeout=600
    )
    assert alone.returncode == 0 and alone.stdout.split() == ["1", "equal"], alone.stderr[-3000:]


def test_a_save_of_an_older_version_opens(tmp_path, monkeypatch):
    """It had no sum of its position."""
    with monkeypatch.context() as before, Checkpointer(tmp_path, keep=2) as saves:
        sums = checkpoint._sums
        before.setattr(checkpoint, "_sums", lambda tree: Unsummed(sums(tree)))
        saves.save(RunPosition(0, 1, 1), make(1))
    with Checkpointer(tmp_path, keep=2) as saves:
        assert_equal(saves.restore(1, abstract()), make(1))


class Unsummed(dict):
    """Sums to which the position's cannot be added."""

    def __or__(self, other):
        return dict(self)

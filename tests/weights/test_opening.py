"""Parameters are read while the caller goes on; who asks for them waits, and is told there what
went wrong."""

from __future__ import annotations

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import load_component
from pixart_jax.errors import UserError
from pixart_jax.weights import files
from pixart_jax.weights.opening import PendingParams

BATCH = 2


@pytest.fixture
def folder(saved_transformer):
    return saved_transformer


@pytest.fixture
def gate(monkeypatch):
    """An event that every tensor of a safetensors file is waited for with."""
    gate, get = threading.Event(), files.SafetensorsFile.__getitem__

    def waited(self, key):
        assert gate.wait(60)
        return get(self, key)

    monkeypatch.setattr(files.SafetensorsFile, "__getitem__", waited)
    yield gate
    gate.set()


def arguments():
    latents, states = np.ones((BATCH, 8, 8, 4), np.float32), np.ones((BATCH, 7, 10), np.float32)
    return latents, np.full(BATCH, 500, np.float32), states, np.full(BATCH, 5, np.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_needs_no_parameter_waits_for_none(folder, gate, dtype):
    part = load_component(folder, dtype)
    other = part.replace(dtype=jnp.float32)
    shapes = part.shapes
    assert part.module.config is part.config and isinstance(other._held, PendingParams)
    gate.set()
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), part.params)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes) == described
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), part.shapes) == described
    assert other.params is part.params


def test_a_call_compiles_while_parameters_are_read_and_does_not_compile_again(folder, gate):
    part = load_component(folder)
    compiled = []

    def heard(event, duration, **more):
        if (
            event == "/jax/core/compile/backend_compile_duration"
            and threading.current_thread().name == "caller"
        ):
            compiled.append(more.get("fun_name"))
            if "_apply" in str(compiled[-1]):
                gate.set()  # nothing else opens it

    outputs = []
    caller = threading.Thread(
        target=lambda: outputs.append(part.apply(*arguments())), name="caller"
    )
    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        caller.start()
        caller.join(60)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert outputs and sum("_apply" in str(name) for name in compiled) == 1
    np.testing.assert_array_equal(outputs[0], load_component(folder).apply(*arguments()))


def test_what_goes_wrong_is_raised_where_parameters_are_asked_for(folder, monkeypatch):
    def damaged(self, key):
        raise UserError(f"{key} cannot be read")

    monkeypatch.setattr(files.SafetensorsFile, "__getitem__", damaged)
    part = load_component(folder)
    for _ in range(2):
        with pytest.raises(UserError, match="cannot be read"):
            _ = part.params


def test_one_part_is_read_after_another(folder, monkeypatch):
    taken, get = [], files.SafetensorsFile.__getitem__
    monkeypatch.setattr(
        files.SafetensorsFile,
        "__getitem__",
        lambda self, key: (taken.append(id(self)), get(self, key))[1],
    )
    first, second = load_component(folder), load_component(folder)
    assert second.params and first.params
    changes = sum(one != other for one, other in zip(taken, taken[1:], strict=False))
    assert len(set(taken)) == 2 and changes == 1


def test_parameters_come_to_the_device_that_was_the_default_when_they_were_asked_for(folder):
    opened = threading.Event()
    (device,) = jax.devices()[:1]
    with jax.default_device(device):
        found = PendingParams({}, lambda: (opened.wait(60), jax.config.jax_default_device)[1])
    opened.set()
    assert found.result() == device


ENDS = """
import sys, time
from pixart_jax.weights import streaming
from pixart_jax import load_component
take = streaming._Pages.take
def slow(self, name):
    time.sleep(0.05)
    print(name, flush=True)
    return take(self, name)
streaming._Pages.take = slow
part = load_component(sys.argv[1])
sys.exit("error: something else")
"""


def test_a_process_that_ends_does_not_read_on(folder):
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr == "error: something else\n"
    assert len(done.stdout.splitlines()) < 5  # of some eighty tensors

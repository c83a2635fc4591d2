"""A step whose loss or gradient is not finite, or a spike, is skipped: to the bit, at no cost of
memory."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.config import MeshConfig, OptimizerConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training import bad_steps, step
from pixart_jax.training.bad_steps import describe
from pixart_jax.training.optimizer import make_optimizer, schedule
from pixart_jax.training.state import abstract_state, state_from


def losses(params, batch, keys, base):
    """A regression; "kink" puts a term into the loss whose value is 0 and whose gradient is NaN."""
    del keys, base
    error = batch["x"] @ params["w"]
    nothing = jnp.square(params["w"] - params["w"]).sum()
    kink = jnp.sqrt(jnp.where(batch["kink"] > 0, nothing, 1.0))  # √0 has no derivative
    return {"loss": jnp.square(error).mean(-1) + kink * batch["kink"]}


def compiled(accumulate=1, name="adamw", spike_factor=20.0, shape=(6, 3)):
    """(the step, its optimizer, its state as shapes) of the regression with a ``shape`` matrix."""
    config = OptimizerConfig(
        name=name, learning_rate=1e-2, warmup_steps=0, schedule="linear", clip=1.0, ema=0.9
    )
    optimizer = make_optimizer(config, 20, 8, {"w": ()})
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state({"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, optimizer, mesh)
    options = {"accumulate": accumulate, "spike_factor": spike_factor}
    options |= {"optimizer": optimizer, "rate": schedule(config, 20, 8)}
    task = SimpleNamespace(losses=losses)
    return step.CompiledStep(mesh, abstract, task=task, **options), optimizer, abstract


@functools.cache
def prepared(window, **how):
    """``compiled`` for this WINDOW, which the step reads when it is traced."""
    return compiled(**how)


def batch(number: int, scale=1.0, kink=0.0, poison=None):
    x = np.random.default_rng(number).normal(size=(8, 6)).astype(np.float32) * scale
    if poison is not None:
        x[poison, 0] = np.nan
    return {"x": x, "kink": np.full((8,), kink, np.float32)}


def run(batches, **how):
    """(final state as numpy, metrics of each step)."""
    take, optimizer, abstract = prepared(bad_steps.WINDOW, **how)
    weights = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    state, history = state_from({"w": weights}, optimizer, abstract), []
    for number, given in enumerate(batches):
        state, metrics = take(state, given, jax.random.key(number))
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), history


def assert_same(a, b):
    a, b = (a.params, a.opt_state), (b.params, b.opt_state)
    jax.tree.map(np.testing.assert_array_equal, a, b)


BAD = {"loss": dict(poison=3), "gradient": dict(kink=1.0), "overflow": dict(scale=1e30)}


@pytest.mark.parametrize(("accumulate", "name"), [(1, "adamw"), (4, "came")])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_step_leaves_parameters_moments_and_average_as_they_were_to_the_bit(
    kind, accumulate, name
):
    good, how = [batch(k) for k in range(4)], {"accumulate": accumulate, "name": name}
    without, rows = run(good, **how)
    state, history = run([*good[:2], batch(9, **BAD[kind]), *good[2:]], **how)
    assert_same(state, without)
    assert [row["skipped"] for row in history] == [0, 0, 1, 0, 0]
    assert int(state.step) == 5 and int(without.step) == 4  # the place in the run goes on
    assert int(state.guard.skipped) == 1 and int(state.guard.consecutive) == 0
    # the rate is that of the steps that were taken
    assert [row["lr"] for row in history[3:]] == [row["lr"] for row in rows[2:]]


def test_bad_steps_in_a_row_are_counted_and_the_means_are_of_the_good_ones():
    bad = batch(0, poison=0)
    state, history = run([batch(1), bad, bad, batch(2), bad, batch(3)])
    assert [row["skipped_in_row"] for row in history] == [0, 1, 2, 0, 1, 0]
    good = [row for row in history if not row["skipped"]]
    for name in ("loss", "grad_norm"):
        mean = np.mean([row[name] for row in good])
        assert float(getattr(state.guard, name)) == pytest.approx(mean, rel=1e-6)


def test_a_spike_is_skipped_once_there_are_enough_good_steps(monkeypatch):
    monkeypatch.setattr(bad_steps, "WINDOW", 4)
    good = [batch(k) for k in range(5)]
    spike = batch(9, scale=10.0)  # its loss is about a hundred times the others'
    assert int(run([*good[:2], spike])[0].guard.skipped) == 0
    late, history = run([*good, spike])
    assert [row["skipped"] for row in history] == [0] * 5 + [1]
    assert_same(late, run(good)[0])
    for patient in (None, 1000.0):
        assert int(run([*good, spike], spike_factor=patient)[0].guard.skipped) == 0


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["adamw", "came"])
def test_guarding_takes_no_memory(name, monkeypatch):
    """XLA's own account of the step with and without the guard, where the state is much larger than
    the activations."""
    shape = (2048, 512)
    fed = {"x": jnp.zeros((8, shape[0])), "kink": jnp.zeros((8,))}

    def temporary() -> int:
        take, _, abstract = compiled(name=name, shape=shape)
        memory = take.trace(abstract, fed, jax.random.key(0)).lower().compile().memory_analysis()
        # the state is updated in place
        assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
        return memory.temp_size_in_bytes

    guarded = temporary()
    monkeypatch.setattr(step, "update_where", lambda ok, update, *old, on_cpu: update(*old))
    assert guarded < temporary() + 0.02 * 4 * shape[0] * shape[1]


def test_a_bad_step_is_described_with_its_records():
    why = describe({"loss": np.nan, "grad_norm": np.inf}, [f"r{k}" for k in range(10)])
    records = "r0, r1, r2, r3, r4, r5, r6, r7 and 2 more"
    assert why == f"loss is nan and grad_norm is inf; the batch held {records}"
    why = describe({"loss": 7.0, "grad_norm": 1.0}, [])
    assert why == "loss 7 or grad_norm 1 is far above its running mean"

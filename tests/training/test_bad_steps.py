"""A step whose loss or gradient is no number, or a spike, is not taken: to the bit, at no cost of
memory, and resumed as it was."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from pixart_jax.models.transformer import PixArtTransformer, TransformerConfig
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training import bad_steps
from pixart_jax.training.bad_steps import describe
from pixart_jax.training.optimizer import make_optimizer, schedule
from pixart_jax.training.state import abstract_state, state_from
from pixart_jax.training.step import CompiledStep
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.training.tasks.text_to_image import TextToImage

BOXED = {"w": jax.ShapeDtypeStruct((6, 3), jnp.float32)}


def losses(params, batch, keys):
    """A regression; "kink" puts a term into the loss whose value is 0 and whose gradient is no
    number."""
    del keys
    error = batch["x"] @ params["w"]
    nothing = jnp.square(params["w"] - params["w"]).sum()
    kink = jnp.sqrt(jnp.where(batch["kink"] > 0, nothing, 1.0))  # √0 has no derivative
    return {"loss": jnp.square(error).mean(-1) + kink * batch["kink"]}


@functools.cache
def prepared(accumulate=1, name="adamw", spike_factor=20.0, window=bad_steps.WINDOW):
    """(a new state's maker, the compiled step)."""
    config = OptimizerConfig(
        name=name, learning_rate=1e-2, warmup_steps=0, schedule="linear", clip=1.0, ema=0.9
    )
    optimizer = make_optimizer(config, 20, 8, jax.tree.map(lambda _: (), BOXED))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = abstract_state(BOXED, optimizer, mesh)
    weights = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    step = CompiledStep(
        mesh,
        abstract,
        task=SimpleNamespace(losses=losses),
        optimizer=optimizer,
        rate=schedule(config, 20, 8),
        accumulate=accumulate,
        spike_factor=spike_factor,
    )
    return lambda: state_from({"w": weights}, optimizer, abstract), step


def batch(number: int, scale=1.0, kink=0.0, poison=None):
    x = np.random.default_rng(number).normal(size=(8, 6)).astype(np.float32) * scale
    if poison is not None:
        x[poison, 0] = np.nan
    return {"x": x, "kink": np.full((8,), kink, np.float32)}


def run(batches, **how):
    """(final state as numpy, metrics of each step)."""
    begin, step = prepared(**how, window=bad_steps.WINDOW)
    state, history = begin(), []
    for number, given in enumerate(batches):
        state, metrics = step(state, given, jax.random.key(number))
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), history


def assert_same(a, b):
    for x, y in zip(
        jax.tree.leaves((a.params, a.opt_state)),
        jax.tree.leaves((b.params, b.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


BAD = {"loss": dict(poison=3), "gradient": dict(kink=1.0), "overflow": dict(scale=1e30)}


@pytest.mark.parametrize(("accumulate", "name"), [(1, "adamw"), (4, "came")])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_step_leaves_parameters_moments_and_average_as_they_were_to_the_bit(
    kind, accumulate, name
):
    good = [batch(k) for k in range(4)]
    without, rows = run(good, accumulate=accumulate, name=name)
    state, history = run(
        [*good[:2], batch(9, **BAD[kind]), *good[2:]], accumulate=accumulate, name=name
    )
    assert_same(state, without)
    assert [row["skipped"] for row in history] == [0, 0, 1, 0, 0]
    assert int(state.step) == 5 and int(without.step) == 4  # the place in the run goes on
    assert int(state.guard.skipped) == 1 and int(state.guard.consecutive) == 0
    # the rate is that of the steps that were taken
    assert [row["lr"] for row in history[3:]] == [row["lr"] for row in rows[2:]]


def test_bad_steps_in_a_row_are_counted_and_a_good_one_begins_anew():
    bad = batch(0, poison=0)
    _, history = run([batch(1), bad, bad, batch(2), bad])
    assert [row["skipped_in_row"] for row in history] == [0, 1, 2, 0, 1]


def test_a_spike_is_skipped_once_enough_good_steps_say_what_is_usual(monkeypatch):
    monkeypatch.setattr(bad_steps, "WINDOW", 4)
    good = [batch(k) for k in range(5)]
    spike = batch(9, scale=10.0)  # its loss is about a hundred times the others'
    early, _ = run([*good[:2], spike])
    assert int(early.guard.skipped) == 0
    late, history = run([*good, spike])
    assert [row["skipped"] for row in history] == [0] * 5 + [1]
    assert_same(late, run(good)[0])
    for patient in (None, 1000.0):
        assert int(run([*good, spike], spike_factor=patient)[0].guard.skipped) == 0


def test_the_running_means_are_those_of_the_good_steps_alone():
    state, history = run([batch(0), batch(1, poison=0), batch(2), batch(3)])
    good = [row for row in history if not row["skipped"]]
    assert float(state.guard.loss) == pytest.approx(
        np.mean([row["loss"] for row in good]), rel=1e-6
    )
    assert float(state.guard.grad_norm) == pytest.approx(
        np.mean([row["grad_norm"] for row in good]), rel=1e-6
    )


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("name", ["adamw", "came"])
def test_guarding_takes_no_memory(name, monkeypatch):
    """XLA's own account of the step with and without the branch, where the state is much larger
    than the activations."""
    module = PixArtTransformer(
        TransformerConfig(
            depth=2, width=256, heads=4, caption_width=64, text_tokens=16, sample_size=8
        )
    )
    task = TextToImage(module, DiffusionObjective(ObjectiveConfig(), 0.2), None, 0)
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    config, mesh = OptimizerConfig(name=name), make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config, 10, 2, rules.logical_names(boxed))
    abstract = abstract_state(boxed, optimizer, mesh)
    shapes = {
        "mean": (2, 4, 4, 4),
        "std": (2, 4, 4, 4),
        "text_states": (2, 8, 64),
        "text_lengths": (2,),
        "size": (2, 2),
        "aspect_ratio": (2,),
    }
    fed = {
        key: jax.ShapeDtypeStruct(shape, jnp.int32 if key == "text_lengths" else jnp.float32)
        for key, shape in shapes.items()
    }

    def temporary() -> int:
        step = CompiledStep(
            mesh, abstract, task=task, optimizer=optimizer, rate=schedule(config, 10, 2)
        )
        with jax.set_mesh(mesh), nn.logical_axis_rules(rules.ACTIVATION_RULES):
            memory = step.jitted.lower(abstract, fed, jax.random.key(0)).compile().memory_analysis()
        # the state is moved where it lies
        assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes
        return memory.temp_size_in_bytes

    guarded = temporary()
    monkeypatch.setattr(jax.lax, "cond", lambda ok, take, keep, *operands: take(*operands))
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract.params))
    assert guarded < temporary() + 0.02 * parameters


def test_a_bad_step_is_described_with_its_records():
    keys = [f"r{k}" for k in range(10)]
    said = describe({"loss": float("nan"), "grad_norm": float("inf")}, keys)
    assert (
        said
        == "loss is nan and grad_norm is inf; the batch held r0, r1, r2, r3, r4, r5, r6, r7 and 2 "
        "more"
    )
    assert (
        describe({"loss": 7.0, "grad_norm": 1.0}, [])
        == "loss 7 or grad_norm 1 is far above its running mean"
    )


def test_options_that_make_no_sense_are_refused():
    from pixart_jax.config import GuardConfig
    from pixart_jax.errors import UserError

    for wrong in ({"spike_factor": 1.0}, {"bad_steps_in_row": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            dataclasses.replace(GuardConfig(), **wrong)

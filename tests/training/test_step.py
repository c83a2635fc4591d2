"""The train step on a two-parameter model whose losses can be written down."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.config import MeshConfig, OptimizerConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training.optimizer import make_optimizer, schedule
from pixart_jax.training.state import abstract_state, state_from
from pixart_jax.training.step import CompiledStep

BOXED = {
    "w": jax.ShapeDtypeStruct((6, 3), jnp.float32),
    "b": jax.ShapeDtypeStruct((3,), jnp.float32),
}


SIZES = (("x", 6), ("y", 3))


def losses(params, batch, keys, base):
    """Regression on noisy inputs: each sample's noise is its own key's."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (6,)))(keys)
    error = (batch["x"] + 0.1 * noise) @ params["w"] + params["b"] - batch["y"]
    return {"loss": jnp.square(error).mean(-1), "absolute": jnp.abs(error).mean(-1)}


def run(accumulate: int, steps: int = 5, **options):
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip=1.0, ema=0.9, **options)
    optimizer = make_optimizer(config, steps, 16, jax.tree.map(lambda _: (), BOXED))
    mesh = make_mesh(MeshConfig())
    abstract = abstract_state(BOXED, optimizer, mesh)
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(6, 3)), "b": np.zeros(3)}
    params = jax.tree.map(np.float32, params)
    state = state_from(params, optimizer, abstract)
    step = CompiledStep(
        mesh,
        abstract,
        task=SimpleNamespace(losses=losses),
        optimizer=optimizer,
        rate=schedule(config, steps, 16),
        accumulate=accumulate,
    )
    history = []
    for number in range(steps):
        rng = np.random.default_rng(number)
        batch = {name: rng.normal(size=(16, n)).astype(np.float32) for name, n in SIZES}
        state, metrics = step(state, batch, jax.random.fold_in(jax.random.key(7), number))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history, step


@pytest.mark.parametrize("micro", [2, 8, 16])
def test_accumulation_equals_the_whole_batch(micro):
    whole, history, _ = run(1)
    parts, history_of_parts, _ = run(micro)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(history, history_of_parts, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_the_step_is_a_function_of_state_batch_and_key():
    first, history, _ = run(2)
    second, again, _ = run(2)
    assert history == again
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_executable_for_one_shape_counted_steps_and_named_metrics():
    state, history, step = run(1)
    assert step.executables == 1 and int(state.step) == 5
    assert set(history[0]) == {"loss", "absolute", "lr", "grad_norm", "skipped", "skipped_in_row"}


def test_the_state_starts_with_its_parameters_as_average():
    optimizer = make_optimizer(OptimizerConfig(), 5, 16, jax.tree.map(lambda _: (), BOXED))
    abstract = abstract_state(BOXED, optimizer, make_mesh(MeshConfig()))
    params = {"w": np.ones((6, 3), np.float32), "b": np.arange(3, dtype=np.float32)}
    state = state_from(params, optimizer, abstract)
    np.testing.assert_array_equal(state.average["b"], [0, 1, 2])
    assert jax.tree.structure(state) == jax.tree.structure(abstract)

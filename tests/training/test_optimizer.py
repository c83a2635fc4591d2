"""The Optax chain of a stage."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixart_jax.config import OptimizerConfig
from pixart_jax.training.optimizer import averaged, make_optimizer, parameter_ema, schedule

PARAMS = {
    "blocks": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))},
    "null_caption": jnp.ones((5, 6)),
}
NAMES = {
    "blocks": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
    "null_caption": (None, "text"),
}


@pytest.mark.parametrize("name", ["adamw", "came"])
def test_the_null_caption_never_moves(name):
    config = OptimizerConfig(name, 0.1, warmup_steps=0, weight_decay=0.5, ema=0.5)
    optimizer = make_optimizer(config, 10, 1, NAMES)
    params, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_array_equal(params["null_caption"], PARAMS["null_caption"])
    np.testing.assert_array_equal(averaged(state)["null_caption"], PARAMS["null_caption"])
    assert (params["blocks"]["kernel"] != 1).all() and (params["blocks"]["bias"] != 1).all()


def test_adamw_is_the_official_one():
    """Beside torch.optim.AdamW with the recipe's settings and clipping by global norm, over ten
    steps."""
    import torch

    config = OptimizerConfig("adamw", 1e-2, warmup_steps=0, clip=0.01, ema=0.0)
    optimizer = make_optimizer(config, 100, 1, {"w": (None, None), "b": (None,)})
    rng = np.random.default_rng(0)
    shapes = {"w": (3, 4), "b": (4,)}
    params = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in params.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.03, eps=1e-10)
    params = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(params)
    for _ in range(10):
        grads = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 0.01)
        adamw.step()
    for k, p in theirs.items():
        # torch adds 1e-6 to the norm it clips by
        np.testing.assert_allclose(params[k], p.detach().numpy(), rtol=1e-4)


def rates(**options):
    config = OptimizerConfig(learning_rate=1.0, **options)
    return np.array([schedule(config, 100, 1024)(jnp.asarray(step)) for step in range(100)])


def test_schedules_by_name():
    constant = rates(schedule="constant", warmup_steps=10)
    np.testing.assert_allclose(constant[:10], np.arange(10) / 10, rtol=1e-6)
    assert (constant[10:] == 1).all()
    cosine = rates(schedule="cosine", warmup_steps=10, final_fraction=0.1)
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(90) / 90)) / 2
    np.testing.assert_allclose(cosine[10:], expected, rtol=1e-5)
    linear = rates(schedule="linear", warmup_steps=0, final_fraction=0.5)
    np.testing.assert_allclose(linear, 1 - 0.5 * np.arange(100) / 100, rtol=1e-5)
    rsqrt = rates(schedule="rsqrt", warmup_steps=25)
    np.testing.assert_allclose(rsqrt[25:], np.sqrt(25 / np.arange(25, 100)), rtol=1e-5)


def test_square_root_scaling_with_the_batch():
    assert rates(warmup_steps=0, sqrt_scale_from=256)[5] == pytest.approx(2.0)


def test_a_stage_shorter_than_its_warm_up_is_all_warm_up():
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=1000)
    assert schedule(config, 10, 1)(jnp.asarray(9)) == pytest.approx(9 / 1000)


def test_ema_is_decay_times_old_plus_rest_times_new_parameters():
    decay, rate = 0.9, 0.1
    optimizer = optax.chain(optax.sgd(rate), parameter_ema(decay))
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    state = optimizer.init(params)
    expected_p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    expected_e = dict(expected_p)
    rng = np.random.default_rng(0)
    for _ in range(5):
        grads = {"w": rng.normal(size=2), "b": rng.normal()}
        updates, state = optimizer.update(
            {k: jnp.asarray(v, jnp.float32) for k, v in grads.items()}, state, params
        )
        params = optax.apply_updates(params, updates)
        expected_p = {k: expected_p[k] - rate * grads[k] for k in expected_p}
        expected_e = {k: decay * expected_e[k] + (1 - decay) * expected_p[k] for k in expected_e}
    for k in expected_e:
        np.testing.assert_allclose(averaged(state)[k], expected_e[k], rtol=1e-6)


def test_no_ema_is_none():
    assert averaged(optax.adam(1e-3).init({"w": jnp.ones(2)})) is None

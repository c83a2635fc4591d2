"""The average of the parameters as an Optax transform."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixart_jax.training.ema import averaged, parameter_ema


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


def test_ema_needs_the_parameters():
    ema = parameter_ema(0.5)
    with pytest.raises(ValueError, match="parameters"):
        ema.update({"w": jnp.ones(1)}, ema.init({"w": jnp.ones(1)}))

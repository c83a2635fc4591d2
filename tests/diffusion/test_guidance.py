"""Classifier-free guidance around a denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import diffusion
from pixart_jax.errors import UserError

X = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
T = jnp.full((3,), 500.0)


class Counting:
    """A model whose conditional half says 2x and whose unconditional says x; counts what it is asked on the host."""

    def __init__(self, channels: int = 4):
        self.channels, self.rows = channels, []

    def both(self, x, t):
        jax.debug.callback(lambda n: self.rows.append(int(n)), jnp.asarray(x.shape[0]))
        half = x.shape[0] // 2
        return self._logits(jnp.concatenate([x[:half], 2 * x[half:]]), jnp.repeat(jnp.array([-1.0, 1.0]), half))

    def conditional(self, x, t):
        jax.debug.callback(lambda n: self.rows.append(int(n)), jnp.asarray(x.shape[0]))
        return self._logits(2 * x, jnp.ones(x.shape[0]))

    def _logits(self, prediction, value):
        if self.channels == 4:
            return prediction
        return jnp.concatenate([prediction, jnp.broadcast_to(value[:, None, None, None], prediction.shape)], -1)


def test_all_channels_are_guided_in_one_batch_of_both_halves():
    model = Counting()
    out = diffusion.guided(model.both, 4.5)(X, T)
    jax.effects_barrier()
    np.testing.assert_allclose(out, X + 4.5 * (2 * X - X), rtol=1e-6)
    assert model.rows == [6]


def test_scale_one_does_no_second_pass():
    model = Counting()
    out = diffusion.guided(model.both, 1.0, conditional=model.conditional)(X, T)
    jax.effects_barrier()
    np.testing.assert_array_equal(out, 2 * X)
    assert model.rows == [3]
    with pytest.raises(UserError, match="conditional"):
        diffusion.guided(model.both, 1)


def test_scale_may_be_traced_and_one_per_image():
    scales = jnp.array([1.0, 2.0, 7.5])
    out = jax.jit(lambda s: diffusion.guided(Counting().both, s)(X, T))(scales)
    np.testing.assert_allclose(out, X * (1 + scales[:, None, None, None]), rtol=1e-6)


def test_variance_logits_are_the_conditional_halfs():
    out = diffusion.guided(Counting(8).both, 3.0)(X, T)
    np.testing.assert_allclose(out[..., :4], 4 * X, rtol=1e-6)
    np.testing.assert_array_equal(out[..., 4:], jnp.ones_like(X))


def test_outside_the_interval_only_half_the_rows_run():
    model = Counting()
    denoiser = diffusion.guided(model.both, 2.0, conditional=model.conditional, interval=(300.0, 700.0))
    jax.block_until_ready(diffusion.sample(denoiser, X, steps=10))
    jax.effects_barrier()
    times = diffusion.timesteps("dpm++", 10)
    assert sorted(model.rows) == sorted(6 if 300 <= t <= 700 else 3 for t in times)
    assert 0 < model.rows.count(6) < 10


def test_interval_over_all_times_is_plain_guidance():
    model = Counting()
    whole = diffusion.guided(model.both, 2.0, conditional=model.conditional, interval=(0.0, 1000.0))
    np.testing.assert_allclose(diffusion.sample(whole, X), diffusion.sample(diffusion.guided(model.both, 2.0), X), rtol=1e-6)

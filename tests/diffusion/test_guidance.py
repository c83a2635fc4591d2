"""Classifier-free guidance around a denoiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import diffusion
from pixart_jax.diffusion import guidance
from pixart_jax.errors import UserError

X = jax.random.normal(jax.random.key(0), (3, 2, 2, 4))
T = jnp.full((3,), 500.0)


class Counting:
    """A model whose conditional half says 2x and whose unconditional says x; counts what it is
    asked on the host."""

    def __init__(self, channels: int = 4):
        self.channels, self.rows = channels, []

    def both(self, x, t):
        jax.debug.callback(lambda n: self.rows.append(int(n)), jnp.asarray(x.shape[0]))
        half = x.shape[0] // 2
        said = jnp.concatenate([x[:half], 2 * x[half:]])
        return self._logits(said, jnp.repeat(jnp.array([-1.0, 1.0]), half))

    def conditional(self, x, t):
        jax.debug.callback(lambda n: self.rows.append(int(n)), jnp.asarray(x.shape[0]))
        return self._logits(2 * x, jnp.ones(x.shape[0]))

    def _logits(self, prediction, value):
        if self.channels == 4:
            return prediction
        logits = jnp.broadcast_to(value[:, None, None, None], prediction.shape)
        return jnp.concatenate([prediction, logits], -1)


def test_all_channels_are_guided_in_one_batch_of_both_halves():
    model = Counting()
    out = diffusion.classifier_free_guidance(model.both, 4.5)(X, T)
    jax.effects_barrier()
    np.testing.assert_allclose(out, X + 4.5 * (2 * X - X), rtol=1e-6)
    assert model.rows == [6]


def test_scale_one_does_no_second_pass():
    model = Counting()
    out = diffusion.classifier_free_guidance(model.both, 1.0, conditional=model.conditional)(X, T)
    jax.effects_barrier()
    np.testing.assert_array_equal(out, 2 * X)
    assert model.rows == [3]
    with pytest.raises(UserError, match="conditional"):
        diffusion.classifier_free_guidance(model.both, 1)


def test_scale_may_be_traced_and_one_per_image():
    scales = jnp.array([1.0, 2.0, 7.5])
    out = jax.jit(lambda s: diffusion.classifier_free_guidance(Counting().both, s)(X, T))(scales)
    np.testing.assert_allclose(out, X * (1 + scales[:, None, None, None]), rtol=1e-6)


def test_variance_logits_are_the_conditional_halfs():
    out = diffusion.classifier_free_guidance(Counting(8).both, 3.0)(X, T)
    np.testing.assert_allclose(out[..., :4], 4 * X, rtol=1e-6)
    np.testing.assert_array_equal(out[..., 4:], jnp.ones_like(X))


def segments(model, interval, steps=10, scale=2.0):
    """A run that is guided within the interval alone."""
    guided = diffusion.classifier_free_guidance(model.both, scale)
    denoisers = {True: guided, False: model.conditional}
    flags = guidance.within(diffusion.timesteps("dpm++", steps), interval)
    return [
        diffusion.Segment(count, lambda x, t, given, memory, of=denoisers[flag]: (of(x, t), memory))
        for flag, count in guidance.run_lengths(flags)
    ]


def test_outside_the_interval_only_half_the_rows_run():
    model = Counting()
    made = segments(model, (300.0, 700.0))
    assert len(made) == 3
    jax.block_until_ready(diffusion.sample(made, X, steps=10))
    jax.effects_barrier()
    times = diffusion.timesteps("dpm++", 10)
    assert sorted(model.rows) == sorted(6 if 300 <= t <= 700 else 3 for t in times)
    assert 0 < model.rows.count(6) < 10


def test_an_interval_is_what_a_branch_at_each_step_would_compute():
    model, times = Counting(), diffusion.timesteps("dpm++", 10)
    guided = diffusion.classifier_free_guidance(model.both, 2.0)

    def branch(x, t):
        within = (t[0] >= 300) & (t[0] <= 700)
        return jax.lax.cond(within, guided, model.conditional, x, t)

    branching = diffusion.sample(branch, X, steps=len(times))
    found = diffusion.sample(segments(model, (300.0, 700.0)), X, steps=10)
    np.testing.assert_allclose(found, branching, rtol=1e-5, atol=1e-6)


def test_interval_over_all_times_is_plain_guidance():
    model = Counting()
    plain = diffusion.sample(diffusion.classifier_free_guidance(model.both, 2.0), X)
    whole = diffusion.sample(segments(model, (0.0, 1000.0), steps=20), X)
    np.testing.assert_allclose(whole, plain, rtol=1e-6)


def test_runs_and_intervals_of_times():
    t = np.array([999.0, 600.0, 300.0, 0.0])
    assert guidance.within(t, None).all()
    assert guidance.within(t, (300, 600)).tolist() == [False, True, True, False]
    assert guidance.run_lengths(np.array([True, True, False])) == [(True, 2), (False, 1)]
    assert guidance.run_lengths(np.ones(3, bool)) == [(True, 3)]

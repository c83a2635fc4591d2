"""The noise schedule and the Gaussian algebra."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusers import DDIMScheduler

from pixart_jax import diffusion
from pixart_jax.diffusion import schedule as schedules
from pixart_jax.errors import UserError


def test_linear_schedule_has_pixarts_end_values():
    table = schedules.linear().alphas_cumprod
    assert table.shape == (1000,) and table.dtype == np.float64
    assert table[0] == pytest.approx(0.9999, abs=1e-12)
    assert table[999] == pytest.approx(4.036e-5, rel=1e-3)


STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schedules.linear(), {"beta_schedule": "linear"}),
        (schedules.linear(1000, 2e-4, 0.015), {"beta_start": 2e-4, "beta_end": 0.015}),
        (schedules.scaled_linear(), {"beta_schedule": "scaled_linear", **STABLE_DIFFUSION}),
        (schedules.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_schedules_are_diffusers(ours, theirs):
    betas = DDIMScheduler(**theirs).betas.numpy()
    np.testing.assert_allclose(ours.betas, betas, rtol=2e-5, atol=1e-8)


def test_fractional_time_interpolates_log_alpha_linearly():
    schedule = schedules.linear()
    log_alpha = 0.5 * np.log(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    t = np.array([0.0, 0.25, 49.95, 500.5, 949.05, 998.9, 999.0])
    low = np.minimum(t.astype(int), 998)
    expected = log_alpha[low] + (t - low) * (log_alpha[low + 1] - log_alpha[low])
    np.testing.assert_allclose(schedule.log_alpha(t), expected, rtol=1e-12)
    np.testing.assert_allclose(schedule.alpha(t), np.exp(expected), rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1 - np.exp(2 * expected)), rtol=1e-12)
    # the device's fp32 agrees with the host's float64, for both kinds of time
    for on_host in (schedule.alpha, schedule.sigma):
        on_device = jax.jit(on_host)
        for times, rtol in ((np.float32(t), 1e-5), (np.arange(1000), 2e-6)):
            np.testing.assert_allclose(on_device(times), on_host(times), rtol=rtol)


def test_epsilon_and_v_imply_each_other_and_x0():
    rng = np.random.default_rng(0)
    x0, noise = (jnp.asarray(rng.standard_normal((5, 3, 2, 4)), jnp.float32) for _ in range(2))
    t = jnp.array([0, 10, 250, 700, 900])
    x_t = diffusion.add_noise(x0, noise, t)
    v = diffusion.velocity(x0, noise, t)
    alpha = np.sqrt(schedules.linear().alphas_cumprod[np.asarray(t)])[:, None, None, None]
    sigma = np.sqrt(1 - alpha**2)
    wide_x0, wide_noise = (np.asarray(a, np.float64) for a in (x0, noise))
    np.testing.assert_allclose(x_t, alpha * wide_x0 + sigma * wide_noise, atol=1e-6)
    np.testing.assert_allclose(v, alpha * wide_noise - sigma * wide_x0, atol=1e-6)
    np.testing.assert_allclose(diffusion.to_epsilon(v, x_t, t, "v"), noise, atol=2e-6)
    np.testing.assert_allclose(diffusion.to_x0(v, x_t, t, "v"), x0, atol=2e-6)
    np.testing.assert_allclose(diffusion.to_x0(noise, x_t, t), x0, atol=2e-5)
    logits = jnp.ones_like(x0)
    both = diffusion.to_epsilon(jnp.concatenate([v, logits], axis=-1), x_t, t, "v")
    np.testing.assert_allclose(both[..., :4], noise, atol=2e-6)
    np.testing.assert_array_equal(both[..., 4:], logits)


def test_bad_betas_predictions_and_channels_are_named():
    with pytest.raises(UserError, match="betas"):
        diffusion.Schedule(np.array([0.1, 1.0]))
    x = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(UserError, match="did you mean 'epsilon'"):
        diffusion.to_epsilon(x, x, jnp.array([3]), "epsilo")
    with pytest.raises(UserError, match="3 channels"):
        diffusion.to_x0(x[..., :3], x, jnp.array([3]))

"""Respacing and the ancestral step, against float64 formulas and published step lists."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import diffusion
from pixart_jax.diffusion.respacing import respace_schedule, space_timesteps
from pixart_jax.errors import UserError

CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def test_100_steps_keep_both_ends_and_are_no_plain_stride():
    times = space_timesteps(1000, "100")
    assert len(times) == 100 and list(times[:3]) == [0, 10, 20] and times[-1] == 999
    assert list(space_timesteps(1000, 100)) == list(times)
    assert set(np.diff(times)) == {10, 11} and 505 in times


def test_published_respacings():
    # Improved DDPM's own example: 300 steps in sections of 10, 15 and 20.
    times = space_timesteps(300, "10,15,20")
    assert [((times >= a) & (times < a + 100)).sum() for a in (0, 100, 200)] == [10, 15, 20]
    assert list(space_timesteps(1000, "ddim50")) == list(range(0, 1000, 20))
    assert list(space_timesteps(1000, "1000")) == list(range(1000))
    assert list(space_timesteps(17, "3,4")) == [0, 4, 8, 9, 11, 14, 16]


@pytest.mark.parametrize("steps", ["ddim333", "0", "-5", "10,", "many", "1001", "600,10"])
def test_impossible_respacings_are_one_clear_line(steps):
    with pytest.raises(UserError) as caught:
        space_timesteps(1000, steps)
    assert steps in str(caught.value) and "\n" not in str(caught.value)


def test_respaced_process_has_the_same_alpha_bar_at_the_kept_times():
    times = space_timesteps(1000, "25")
    respaced = respace_schedule(diffusion.schedule.linear(), times)
    np.testing.assert_allclose(respaced.alphas_cumprod, CUMPROD[times], rtol=1e-12)


@pytest.mark.parametrize("steps", [1000, 100, "10,10,5"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_posterior_matches_float64_formulas(steps, prediction):
    rng = np.random.default_rng(2)
    kept = CUMPROD[space_timesteps(1000, steps)]
    t = np.array([0, 1, 2, len(kept) // 2, len(kept) - 2, len(kept) - 1])
    x_t, output, logits = (rng.standard_normal((len(t), 2, 3, 4)) for _ in range(3))

    before = np.append(1.0, kept[:-1])
    beta = 1 - kept / before
    small = beta * (1 - before) / (1 - kept)
    small[0] = small[1]
    a, b, cum, prior = (values[t].reshape(-1, 1, 1, 1) for values in (beta, small, kept, before))
    alpha, sigma = np.sqrt(cum), np.sqrt(1 - cum)
    of_v = alpha * x_t - sigma * output
    x0 = (x_t - sigma * output) / alpha if prediction == "epsilon" else of_v
    mean = np.sqrt(prior) * a / (1 - cum) * x0 + np.sqrt(1 - a) * (1 - prior) / (1 - cum) * x_t
    log_variance = (logits + 1) / 2 * np.log(a) + (1 - logits) / 2 * np.log(b)

    both = jnp.asarray(np.concatenate([output, logits], -1), jnp.float32)
    got = diffusion.ddpm_posterior(
        both, jnp.asarray(x_t, jnp.float32), jnp.asarray(t), steps=steps, prediction=prediction
    )
    np.testing.assert_allclose(got[0], mean, atol=5e-6, rtol=1e-5)
    np.testing.assert_allclose(got[1], log_variance, atol=1e-5, rtol=1e-6)


def test_posterior_asks_for_the_variance_half_and_for_an_index_of_the_respaced_process():
    x = jnp.zeros((1, 2, 2, 4))
    with pytest.raises(UserError, match="8 channels"):
        diffusion.ddpm_posterior(x, x, jnp.array([0]))
    with pytest.raises(UserError, match="0 … 99"):
        diffusion.ddpm_posterior(jnp.zeros((1, 2, 2, 8)), x, jnp.array([999]), steps=100)


def test_a_sampled_step_is_the_posteriors_mean_plus_its_deviation_times_the_noise():
    """What `sample` does in its first ddpm step, with its own random numbers, is what
    ddpm_posterior says."""
    posterior = jax.jit(functools.partial(diffusion.ddpm_posterior, steps=100))
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))

    def denoiser(x, t):
        return jnp.concatenate([0.9 * x, jnp.sin(3 * x)], axis=-1)

    keys = jax.random.split(jax.random.key(7), 2)
    # From step 98 of 100 on: index 1, with noise, then index 0, without.
    got = diffusion.sample(denoiser, x, solver="ddpm", steps=100, key=keys, start=98)
    mean, log_variance = posterior(denoiser(x, None), x, jnp.array([1, 1]))
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, 98), x.shape[1:]) for key in keys])
    middle = mean + jnp.exp(0.5 * log_variance) * noise
    last, _ = posterior(denoiser(middle, None), middle, jnp.array([0, 0]))
    np.testing.assert_allclose(got, last, atol=2e-6)
    fixed = diffusion.sample(lambda x, t: 0.9 * x, x, solver="ddpm", steps=100, key=keys, start=98)
    _, small = posterior(jnp.concatenate([0.9 * x, -jnp.ones_like(x)], -1), x, jnp.array([1, 1]))
    middle = mean + jnp.exp(0.5 * small) * noise  # logits −1 are the fixed variance β̃
    last, _ = posterior(denoiser(middle, None), middle, jnp.array([0, 0]))
    np.testing.assert_allclose(fixed, last, atol=2e-6)

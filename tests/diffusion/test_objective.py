"""The loss, against the formulas evaluated in float64 here."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import diffusion
from pixart_jax.diffusion.objective import min_snr_weight
from pixart_jax.errors import UserError

BETAS = np.linspace(1e-4, 0.02, 1000)
CUMPROD = np.cumprod(1 - BETAS)
TIMES = np.array([0, 1, 2, 50, 400, 900, 998, 999])


def _problem(prediction: str):
    rng = np.random.default_rng(1)
    shape = (len(TIMES), 3, 5, 4)
    # some |x0| beyond 0.999, where the likelihood's outer cells are
    x0 = rng.standard_normal(shape) * 0.8
    noise = rng.standard_normal(shape)
    alpha, sigma = _at(np.sqrt(CUMPROD)), _at(np.sqrt(1 - CUMPROD))
    target = noise if prediction == "epsilon" else alpha * noise - sigma * x0
    output = target + 0.2 * rng.standard_normal(shape)
    logits = rng.standard_normal(shape) * 1.2
    return x0, noise, output, logits


def _at(table):
    return table[TIMES].reshape(-1, 1, 1, 1)


def _expected(x0, noise, output, logits, prediction):
    """mse and vb, straight from the papers."""
    before = np.append(1.0, CUMPROD[:-1])
    alpha, sigma = _at(np.sqrt(CUMPROD)), _at(np.sqrt(1 - CUMPROD))
    x_t = alpha * x0 + sigma * noise
    if prediction == "epsilon":
        implied, target = (x_t - sigma * output) / alpha, noise
    else:
        implied, target = alpha * x_t - sigma * output, alpha * noise - sigma * x0
    of_x0 = _at(np.sqrt(before) * BETAS / (1 - CUMPROD))
    of_xt = _at(np.sqrt(1 - BETAS) * (1 - before) / (1 - CUMPROD))
    variance = BETAS * (1 - before) / (1 - CUMPROD)
    variance[0] = variance[1]
    true_mean, mean = of_x0 * x0 + of_xt * x_t, of_x0 * implied + of_xt * x_t
    true_log, fraction = _at(np.log(variance)), (logits + 1) / 2
    log = fraction * _at(np.log(BETAS)) + (1 - fraction) * true_log
    kl = log - true_log - 1 + np.exp(true_log - log) + (true_mean - mean) ** 2 * np.exp(-log)

    def cdf(z):
        return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    scale = np.exp(0.5 * log)
    upper, lower = cdf((x0 - mean + 1 / 255) / scale), cdf((x0 - mean - 1 / 255) / scale)
    cell = np.where(x0 < -0.999, upper, np.where(x0 > 0.999, 1 - lower, upper - lower))
    nll = -np.log(np.maximum(cell, 1e-12))
    vb = np.where(TIMES == 0, nll.mean((1, 2, 3)), 0.5 * kl.mean((1, 2, 3))) / np.log(2)
    return ((output - target) ** 2).mean(axis=(1, 2, 3)), vb


def _loss(x0, noise, output, logits, **options):
    arrays = (np.concatenate([output, logits], axis=-1), x0, noise)
    loss = jax.jit(functools.partial(diffusion.training_loss, **options))
    return loss(*(jnp.asarray(a, jnp.float32) for a in arrays), jnp.asarray(TIMES))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_mse_and_vb_match_float64_formulas(prediction):
    problem = _problem(prediction)
    mse, vb = _expected(*problem, prediction)
    loss = _loss(*problem, prediction=prediction)
    assert loss["mse"].shape == loss["vb"].shape == (len(TIMES),)
    np.testing.assert_allclose(loss["mse"], mse, rtol=5e-6)
    np.testing.assert_allclose(loss["vb"], vb, rtol=1e-5)


def test_epsilon_and_v_have_one_vb_for_the_same_implied_x0():
    x0, noise, output, logits = _problem("epsilon")
    alpha, sigma = _at(np.sqrt(CUMPROD)), _at(np.sqrt(1 - CUMPROD))
    x_t = alpha * x0 + sigma * noise
    as_v = (output - sigma * x_t) / alpha
    # above, v and ε of one x0 differ by 1/α, and fp32 inputs no longer name the same x0
    keep = TIMES < 900
    epsilon = _loss(x0, noise, output, logits)["vb"]
    v = _loss(x0, noise, as_v, logits, prediction="v")["vb"]
    np.testing.assert_allclose(v[keep], epsilon[keep], rtol=1e-4)


def test_vb_trains_the_variance_and_not_the_mean():
    x0, noise, output, logits = (jnp.asarray(a, jnp.float32) for a in _problem("epsilon"))

    def vb(output, logits):
        both = jnp.concatenate([output, logits], -1)
        return diffusion.training_loss(both, x0, noise, jnp.asarray(TIMES))["vb"].sum()

    of_output, of_logits = jax.jit(jax.grad(vb, argnums=(0, 1)))(output, logits)
    np.testing.assert_array_equal(of_output, np.zeros_like(of_output))
    assert np.isfinite(of_logits).all() and (np.abs(of_logits).max(axis=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize(("prediction", "gamma"), [("epsilon", 5.0), ("v", 5.0), ("epsilon", 1.0)])
def test_min_snr_weights_match_float64(prediction, gamma):
    snr = CUMPROD / (1 - CUMPROD)
    expected = np.minimum(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)
    found = min_snr_weight(jnp.arange(1000), gamma, prediction)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    problem = _problem(prediction)
    plain, weighted = (
        _loss(*problem, prediction=prediction, min_snr_gamma=value) for value in (None, gamma)
    )
    np.testing.assert_allclose(weighted["mse"], plain["mse"] * expected[TIMES], rtol=1e-6)
    np.testing.assert_array_equal(weighted["vb"], plain["vb"])


def test_without_learned_range_vb_is_zero_and_half_the_channels_do():
    x0, noise, output, logits = _problem("epsilon")
    full = _loss(x0, noise, output, logits, learned_range=False)
    np.testing.assert_array_equal(full["vb"], np.zeros(len(TIMES)))
    given = *(jnp.asarray(a, jnp.float32) for a in (output, x0, noise)), jnp.asarray(TIMES)
    half = diffusion.training_loss(*given, learned_range=False)
    np.testing.assert_allclose(half["mse"], full["mse"], rtol=1e-6)
    with pytest.raises(UserError, match="8 channels"):
        diffusion.training_loss(*given)


def test_bf16_model_output_is_taken_in_fp32():
    x0, noise, output, logits = _problem("epsilon")
    low = jnp.asarray(np.concatenate([output, logits], -1), jnp.bfloat16)
    images = (jnp.asarray(a, jnp.float32) for a in (x0, noise))
    loss = diffusion.training_loss(low, *images, jnp.asarray(TIMES))
    mse, vb = _expected(x0, noise, *np.split(np.asarray(low, np.float64), 2, axis=-1), "epsilon")
    assert loss["mse"].dtype == loss["vb"].dtype == jnp.float32
    np.testing.assert_allclose(loss["mse"], mse, rtol=5e-6)
    np.testing.assert_allclose(loss["vb"], vb, rtol=1e-5)

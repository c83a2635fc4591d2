"""The training objective: mean squared error of the prediction, and the variational bound that
teaches the variance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.gaussian import check_prediction, expand_to, split_output, velocity
from pixart_jax.diffusion.posterior import posterior
from pixart_jax.diffusion.schedule import Schedule, linear
from pixart_jax.errors import UserError


def training_loss(
    model_output: jax.Array,
    x0: jax.Array,
    noise: jax.Array,
    t: jax.Array,
    *,
    schedule: Schedule | None = None,
    prediction: str = "epsilon",
    learned_range: bool = True,
    min_snr_gamma: float | None = None,
) -> dict[str, jax.Array]:
    """{"mse": [b], "vb": [b]} in fp32 or wider; a sample's loss is their sum, each a mean over its
    elements.

    model_output: [b, …, 2c] (or [b, …, c] without learned_range) for x_t = add_noise(x0, noise, t).
    x0, noise: [b, …, c]. t: [b] int.
    mse: against ε or v; with min_snr_gamma weighted by :func:`min_snr_weight`.
    vb: one term of the variational bound, in bits a dimension and not rescaled by T, unweighted: KL
        (10) between the true step back and the model's, at t = 0 the discretised-Gaussian
        likelihood. The mean is detached: vb trains the variance alone. For v the mean is that of
        the x_0 it implies (5). Zero without learned_range (a second half is then ignored).
    """
    check_prediction(prediction)
    schedule = schedule or linear()
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    x0, noise, t = jnp.asarray(x0, dtype), jnp.asarray(noise, dtype), jnp.asarray(t)
    output, logits = split_output(jnp.asarray(model_output, dtype), x0.shape[-1])
    target = noise if prediction == "epsilon" else velocity(x0, noise, t, schedule)
    mse = sample_mean(jnp.square(output - target))
    if min_snr_gamma is not None:
        mse = mse * min_snr_weight(t, min_snr_gamma, prediction, schedule).astype(dtype)
    if not learned_range:
        return {"mse": mse, "vb": jnp.zeros_like(mse)}
    if logits is None:
        raise UserError(
            f"learned_range needs a model output of {2 * x0.shape[-1]} channels (prediction, "
            "variance logits)"
        )
    return {
        "mse": mse,
        "vb": _variational_bound(
            jax.lax.stop_gradient(target - output), logits, x0, t, schedule, prediction
        ),
    }


def min_snr_weight(
    t: jax.Array, gamma: float, prediction: str = "epsilon", schedule: Schedule | None = None
) -> jax.Array:
    """[b] weights of Min-SNR (arXiv 2303.09556): min(SNR_t, γ) / SNR_t for ε, min(SNR_t, γ) /
    (SNR_t + 1) for v; t [b] int."""
    check_prediction(prediction)
    cumprod = (schedule or linear()).alphas_cumprod
    snr = cumprod / (1.0 - cumprod)  # (3)
    weights = np.minimum(snr, gamma) / (snr if prediction == "epsilon" else snr + 1.0)
    return jnp.asarray(weights)[jnp.asarray(t)]


def _variational_bound(missed, logits, x0, t, schedule, prediction):
    """vb [b] in bits. missed: target − prediction [b, …, c], detached.

    x_t is the same in both means (7), so they differ by the x_0 coefficient times the error of the
    implied x_0, which by (4) is σ/α · missed for ε and by (5) σ · missed for v. Taken so, nothing
    large cancels in fp32; x_t itself is not needed.
    """

    def at(values: np.ndarray) -> jax.Array:
        return expand_to(jnp.asarray(values)[t], x0)

    tables, cumprod = posterior(schedule), schedule.alphas_cumprod
    x0_error = np.sqrt(1.0 - cumprod) / (np.sqrt(cumprod) if prediction == "epsilon" else 1.0)
    mean_gap = at(tables.x0 * x0_error) * missed
    # log Σ − log β̃, by (9)
    log_ratio = (logits + 1.0) / 2.0 * at(tables.log_variance_max - tables.log_variance_min)
    log_variance = at(tables.log_variance_min) + log_ratio
    kl = gaussian_kl(mean_gap, log_ratio, log_variance)
    # used at t = 0, where (7) is x_0
    nll = -discretized_gaussian_log_likelihood(x0, x0 + mean_gap, 0.5 * log_variance)
    return jnp.where(t == 0, sample_mean(nll), sample_mean(kl)) / np.log(2.0)


def gaussian_kl(mean_gap: jax.Array, log_ratio: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(μ₁, Σ₁) ‖ N(μ₂, Σ₂)) elementwise, in nats, by (10). mean_gap: μ₁ − μ₂; log_ratio: log Σ₂
    − log Σ₁; log_variance: log Σ₂."""
    return 0.5 * (log_ratio + jnp.expm1(-log_ratio) + jnp.square(mean_gap) * jnp.exp(-log_variance))


def discretized_gaussian_log_likelihood(
    x: jax.Array, mean: jax.Array, log_scale: jax.Array
) -> jax.Array:
    """log-probability, elementwise and in nats, of the 1/255-wide cell around x under N(mean, e^(2
    log_scale)).

    The first and the last cell (|x| > 0.999) reach to infinity, as for 8-bit pixels in [−1, 1];
    IDDPM uses it for latents as well. Φ is the tanh form that IDDPM uses; probabilities are floored
    at 1e-12.
    """
    inverse_scale = jnp.exp(-log_scale)
    above = _normal_cdf(inverse_scale * (x - mean + 1.0 / 255.0))
    below = _normal_cdf(inverse_scale * (x - mean - 1.0 / 255.0))
    probability = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1.0 - below, above - below))
    return jnp.log(jnp.maximum(probability, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jnp.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def sample_mean(x: jax.Array) -> jax.Array:
    """Mean over all axes but the first: [b, …] → [b]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))

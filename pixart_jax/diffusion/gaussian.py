"""The Gaussian algebra that everything here rests on, stated once; other modules refer to its
equations by number.

Forward process, with the schedule's α_t = √ᾱ_t and σ_t = √(1 − ᾱ_t):

    x_t = α_t x_0 + σ_t ε,   ε ~ N(0, I)                                                        (1)
    v_t = α_t ε − σ_t x_0                                                                       (2)
    SNR_t = α_t² / σ_t²,   λ_t = log(α_t / σ_t) = ½ log SNR_t                                   (3)

A denoiser gets x_t and t and predicts ε or v; since α² + σ² = 1, each of the two implies x_0 and
the other:

    x_0 = (x_t − σ_t ε) / α_t                                                                   (4)
    x_0 = α_t x_t − σ_t v_t                                                                     (5)
    ε   = α_t v_t + σ_t x_t                                                                     (6)

One step back, from index t to t − 1 of a process with β_t = 1 − ᾱ_t / ᾱ_{t−1} and ᾱ_{−1} = 1 (DDPM,
arXiv 2006.11239, eq. 6–7):

    q(x_{t−1} | x_t, x_0) = N(μ̃_t, β̃_t I)
    μ̃_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t) · x_0 + √(1 − β_t) (1 − ᾱ_{t−1}) / (1 − ᾱ_t) · x_t          (7)
    β̃_t = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) · β_t,  with β̃_1 for β̃_0 = 0 where a log is taken         (8)

The model's step p(x_{t−1} | x_t) has mean (7) at the x_0 that its output implies. Its variance lies
between the two bounds, mixed by the second half of its output, the logits r (Improved DDPM, arXiv
2102.09672, eq. 15):

    log Σ_t = f log β_t + (1 − f) log β̃_t,   f = (r + 1) / 2   (r is not clipped)              (9)

    KL(N(μ₁, Σ₁) ‖ N(μ₂, Σ₂)) = ½ (log Σ₂ − log Σ₁ − 1 + Σ₁/Σ₂ + (μ₁ − μ₂)² / Σ₂)               (10)

Arrays are [b, …, c]; t is [b]. A model with a learned variance returns [b, …, 2c]: the prediction,
then the logits r.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pixart_jax.diffusion.schedule import Schedule, linear
from pixart_jax.errors import UserError, nearest

PREDICTIONS = ("epsilon", "v")


def check_prediction(prediction: str) -> None:
    """UserError unless ``prediction`` is one that this module converts."""
    if prediction not in PREDICTIONS:
        raise UserError(f"unknown prediction {prediction!r}{nearest(prediction, PREDICTIONS)}")


def expand_to(values: jax.Array, x: jax.Array) -> jax.Array:
    """[b] → [b, 1, …, 1] in x's dtype, so that it multiplies x [b, …]; a scalar stays one."""
    values = jnp.asarray(values).astype(x.dtype)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)) if values.ndim else values


def split_output(output: jax.Array, channels: int) -> tuple[jax.Array, jax.Array | None]:
    """A model's output [b, …, c or 2c] → (prediction [b, …, c], variance logits r [b, …, c] or
    None)."""
    if output.shape[-1] == channels:
        return output, None
    if output.shape[-1] == 2 * channels:
        return output[..., :channels], output[..., channels:]
    fits = f"{channels}, or {2 * channels} with variance logits"
    raise UserError(
        f"the model gives {output.shape[-1]} channels for latents of {channels}: it must give "
        f"{fits}"
    )


def add_noise(
    x0: jax.Array, noise: jax.Array, t: jax.Array, schedule: Schedule | None = None
) -> jax.Array:
    """x_t by (1). x0, noise [b, …]; t [b] or a scalar, whole or fractional. Returns [b, …]."""
    schedule = schedule or linear()
    return expand_to(schedule.alpha(t), x0) * x0 + expand_to(schedule.sigma(t), x0) * noise


def velocity(
    x0: jax.Array, noise: jax.Array, t: jax.Array, schedule: Schedule | None = None
) -> jax.Array:
    """v_t by (2), what a v-predicting model learns; shapes as :func:`add_noise`."""
    schedule = schedule or linear()
    return expand_to(schedule.alpha(t), x0) * noise - expand_to(schedule.sigma(t), x0) * x0


def predict_x0(
    output: jax.Array, x_t: jax.Array, alpha: jax.Array, sigma: jax.Array, prediction: str
) -> jax.Array:
    """The x_0 that a prediction [b, …, c] implies, by (4) or (5); alpha and sigma broadcast against
    it."""
    check_prediction(prediction)
    return (
        (x_t - sigma * output) / alpha if prediction == "epsilon" else alpha * x_t - sigma * output
    )


def to_x0(
    model_output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    prediction: str = "epsilon",
    schedule: Schedule | None = None,
) -> jax.Array:
    """The x_0 [b, …, c] that a model's output [b, …, c or 2c] at x_t [b, …, c], t [b] implies.
    Variance logits are dropped."""
    schedule = schedule or linear()
    output, _ = split_output(model_output, x_t.shape[-1])
    return predict_x0(
        output,
        x_t,
        expand_to(schedule.alpha(t), x_t),
        expand_to(schedule.sigma(t), x_t),
        prediction,
    )


def to_epsilon(
    model_output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    prediction: str = "epsilon",
    schedule: Schedule | None = None,
) -> jax.Array:
    """The model's output with its prediction turned into ε, by (6). Variance logits, if there are
    any, stay: [b, …, c or 2c] as given."""
    check_prediction(prediction)
    if prediction == "epsilon":
        return model_output
    schedule = schedule or linear()
    v, logits = split_output(model_output, x_t.shape[-1])
    epsilon = expand_to(schedule.alpha(t), x_t) * v + expand_to(schedule.sigma(t), x_t) * x_t
    return (
        epsilon
        if logits is None
        else jnp.concatenate([epsilon, logits.astype(epsilon.dtype)], axis=-1)
    )

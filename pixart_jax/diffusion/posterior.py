"""One ancestral step back: equations (7)–(9) of gaussian.py as tables over the times of a
process."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion.gaussian import check_prediction, expand_to, predict_x0, split_output
from pixart_jax.diffusion.respacing import respace_schedule, space_timesteps
from pixart_jax.diffusion.schedule import Schedule, linear
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """Coefficients of q(x_{t−1} | x_t, x_0) and the bounds of the learned variance; float64 [T]
    each."""

    x0: np.ndarray  # of x_0 in the mean (7)
    x_t: np.ndarray  # of x_t in the mean (7)
    log_variance_min: np.ndarray  # log β̃_t (8)
    log_variance_max: np.ndarray  # log β_t


@functools.lru_cache(maxsize=32)
def posterior(schedule: Schedule) -> Posterior:
    """The tables of ``schedule``, which may be a respaced one."""
    betas, cumprod = schedule.betas, schedule.alphas_cumprod
    before = np.concatenate([[1.0], cumprod[:-1]])
    variance = (1.0 - before) / (1.0 - cumprod) * betas
    # A process of one time has no β̃_1; nothing is drawn at t = 0, so any finite value serves.
    variance[0] = variance[1] if len(variance) > 1 else betas[0]
    return Posterior(
        x0=np.sqrt(before) * betas / (1.0 - cumprod),
        x_t=np.sqrt(1.0 - betas) * (1.0 - before) / (1.0 - cumprod),
        log_variance_min=np.log(variance),
        log_variance_max=np.log(betas),
    )


def learned_log_variance(
    logits: jax.Array, log_small: jax.Array, log_large: jax.Array
) -> jax.Array:
    """log Σ_t by (9)."""
    fraction = (logits + 1.0) / 2.0
    return fraction * log_large + (1.0 - fraction) * log_small


def ddpm_posterior(
    model_output: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    steps: int | str = 1000,
    *,
    schedule: Schedule | None = None,
    prediction: str = "epsilon",
) -> tuple[jax.Array, jax.Array]:
    """p(x_{t−1} | x_t) of a model with learned range: (mean, log-variance), each [b, …, c] in fp32
    or wider. x_0 is not clipped.

    model_output [b, …, 2c]: the prediction, then the variance logits. x_t [b, …, c]. t [b] int: the
    index in the process of ``steps`` times (0 … steps − 1; for 1000 steps of 1000 it is the model's
    own time). steps: as in respacing.space_timesteps.
    """
    check_prediction(prediction)
    schedule = schedule or linear()
    process = respace_schedule(schedule, space_timesteps(schedule.timesteps, steps))
    dtype = jnp.promote_types(x_t.dtype, jnp.float32)
    x_t, model_output, t = jnp.asarray(x_t, dtype), jnp.asarray(model_output, dtype), jnp.asarray(t)
    output, logits = split_output(model_output, x_t.shape[-1])
    if logits is None:
        raise UserError(
            f"ddpm_posterior needs a model output of {2 * x_t.shape[-1]} channels (prediction, "
            "variance logits)"
        )

    if not isinstance(t, jax.core.Tracer) and ((t < 0) | (t >= process.timesteps)).any():
        raise UserError(
            f"t must lie in 0 … {process.timesteps - 1}: it is the index in the process of steps "
            f"= {steps!r}"
        )

    def at(values: np.ndarray) -> jax.Array:
        return expand_to(jnp.asarray(values)[t], x_t)

    tables = posterior(process)
    cumprod = process.alphas_cumprod
    x0 = predict_x0(output, x_t, at(np.sqrt(cumprod)), at(np.sqrt(1.0 - cumprod)), prediction)
    mean = at(tables.x0) * x0 + at(tables.x_t) * x_t
    return mean, learned_log_variance(
        logits, at(tables.log_variance_min), at(tables.log_variance_max)
    )

"""Denoisers that are known in closed form, for Gaussian and for two-mode data; they take numpy
(float64) or JAX arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

MEAN, SPREAD = 0.3, 0.7  # of the Gaussian data, each coordinate by itself
# of the two-mode data
WEIGHTS, MODES, WIDTHS = np.array([0.3, 0.7]), np.array([-1.0, 0.6]), np.array([0.3, 0.2])


def _at(t):
    return t[0] if getattr(t, "ndim", 0) else t


def gaussian_epsilon(schedule):
    """E[ε | x_t] where x_0 ~ N(MEAN, SPREAD²)."""

    def denoiser(x, t):
        alpha, sigma = schedule.alpha(_at(t)), schedule.sigma(_at(t))
        return sigma * (x - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)

    return denoiser


def gaussian_flow(schedule, x, t_from, t_to):
    """Where the probability-flow ODE takes x from one time to another, exactly: the standardised x
    stays."""

    def deviation(t):
        return np.sqrt(schedule.alpha(t) ** 2 * SPREAD**2 + schedule.sigma(t) ** 2)

    return schedule.alpha(t_to) * MEAN + deviation(t_to) * (
        x - schedule.alpha(t_from) * MEAN
    ) / deviation(t_from)


def two_mode_epsilon(schedule):
    """E[ε | x_t] where x_0 is drawn from two Gaussians; not linear in x, so a wrong memory or order
    shows."""

    def denoiser(x, t):
        xp = jnp if isinstance(x, jax.Array) else np
        alpha, sigma = schedule.alpha(_at(t)), schedule.sigma(_at(t))
        variance = alpha**2 * WIDTHS**2 + sigma**2
        gap = x[..., None] - alpha * MODES
        log_weight = np.log(WEIGHTS) - 0.5 * xp.log(variance) - 0.5 * gap**2 / variance
        weight = xp.exp(log_weight - log_weight.max(axis=-1, keepdims=True))
        weight = weight / weight.sum(axis=-1, keepdims=True)
        return sigma * (weight * gap / variance).sum(axis=-1)

    return denoiser


def as_velocity(schedule, epsilon):
    """The same model, predicting v = (ε − σ x) / α."""

    def denoiser(x, t):
        return (epsilon(x, t) - schedule.sigma(_at(t)) * x) / schedule.alpha(_at(t))

    return denoiser

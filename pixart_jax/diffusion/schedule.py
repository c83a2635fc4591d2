"""The noise schedule: how much signal and how much noise x_t holds at each time.

A schedule is a table over T integer times; t = 0 is the least noisy one, t = T − 1 the noisiest.
Between two integers log α_t is taken as a straight line, so that a solver may stop anywhere in [0,
T − 1] (DPM-Solver, arXiv 2206.00927, §D.4).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Tables of float64 on the host, derived from β_t ∈ (0, 1), t = 0 … T − 1. Two schedules are
    equal when they are the same object."""

    betas: np.ndarray  # [T] float64

    def __post_init__(self):
        betas = np.asarray(self.betas, np.float64)
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise UserError(
                "Schedule.betas must be a non-empty vector of values in (0, 1), got shape "
                f"{betas.shape}"
            )
        object.__setattr__(self, "betas", betas)

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """ᾱ_t = Π_{i ≤ t} (1 − β_i), [T]."""
        return np.cumprod(1.0 - self.betas)

    @functools.cached_property
    def _log_alpha(self) -> np.ndarray:
        return 0.5 * np.log(self.alphas_cumprod)

    def log_alpha(self, t: np.ndarray | jax.Array | float) -> np.ndarray | jax.Array:
        """log α_t, any shape; t whole or fractional, in [0, T − 1]. On the host float64, on the
        device fp32 (float64 under x64)."""
        if not isinstance(t, jax.Array):
            return np.interp(t, np.arange(self.timesteps), self._log_alpha)
        table = jnp.asarray(self._log_alpha)
        if jnp.issubdtype(t.dtype, jnp.integer):
            return table[t]
        return jnp.interp(t, jnp.arange(self.timesteps, dtype=table.dtype), table)

    def alpha(self, t: np.ndarray | jax.Array | float) -> np.ndarray | jax.Array:
        """α_t = √ᾱ_t, the share of the data in x_t; as :meth:`log_alpha`."""
        log_alpha = self.log_alpha(t)
        return (jnp if isinstance(log_alpha, jax.Array) else np).exp(log_alpha)

    def sigma(self, t: np.ndarray | jax.Array | float) -> np.ndarray | jax.Array:
        """σ_t = √(1 − ᾱ_t), the standard deviation of the noise in x_t; as :meth:`log_alpha`."""
        log_alpha = self.log_alpha(t)
        xp = jnp if isinstance(log_alpha, jax.Array) else np
        return xp.sqrt(-xp.expm1(2.0 * log_alpha))


@functools.cache
def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """PixArt's, DiT's and DDPM's schedule: β from beta_start to beta_end in equal steps. The same
    arguments give the same object."""
    return Schedule(np.linspace(beta_start, beta_end, timesteps, dtype=np.float64))


@functools.cache
def scaled_linear(
    timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Schedule:
    """Stable Diffusion's schedule: √β in equal steps."""
    return Schedule(np.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=np.float64) ** 2)


@functools.cache
def cosine(timesteps: int = 1000, max_beta: float = 0.999) -> Schedule:
    """Improved DDPM's schedule (arXiv 2102.09672, eq. 17): ᾱ(u) = cos²((u + 0.008) / 1.008 · π/2),
    β capped at max_beta."""
    alpha_bar = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
    return Schedule(np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], max_beta))

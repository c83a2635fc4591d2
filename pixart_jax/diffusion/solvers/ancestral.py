"""Ancestral sampling: DDPM (arXiv 2006.11239; respacing and learned range as in Improved DDPM,
arXiv 2102.09672) and its deterministic relative DDIM (arXiv 2010.02502). Times are whole by
construction; x_0 is not clipped."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from pixart_jax.diffusion.posterior import learned_log_variance, posterior
from pixart_jax.diffusion.respacing import respace_schedule, space_timesteps
from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import (
    MaybeArray,
    OneStep,
    State,
    StepTable,
    check_start,
    step_count,
)
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DDPM(OneStep):
    """Draws x_{t−1} from p(x_{t−1} | x_t): mean (7), variance (9) where the denoiser returns [b, …,
    2c] (the prediction, then the logits), else β̃_t (8). No noise at the last step; without a key,
    none at all.

    ``steps``: N, 'N', 'a,b,c' or 'ddimN' as in respacing.space_timesteps.
    """

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        visited = space_timesteps(schedule.timesteps, steps)
        check_start(start, len(visited))
        process = respace_schedule(schedule, visited)
        tables = posterior(process)
        order = np.arange(len(visited))[::-1][start:]  # from the noisiest down
        return StepTable(
            t=visited[order].astype(np.float64),
            alpha=np.sqrt(process.alphas_cumprod[order]),
            sigma=np.sqrt(1.0 - process.alphas_cumprod[order]),
            coefficients={
                "x0": tables.x0[order],
                "x": tables.x_t[order],
                "log_small": tables.log_variance_min[order],
                "log_large": tables.log_variance_max[order],
                "noise": (order > 0).astype(np.float64),
            },
            noisy=stochastic,
        )

    def update(
        self, state: State, x0: Array, logits: MaybeArray, c: dict[str, Array], noise: MaybeArray
    ) -> State:
        mean = c["x0"] * x0 + c["x"] * state[0]
        if noise is None:
            return (mean,)
        log_variance = c["log_small"]
        if logits is not None:
            log_variance = learned_log_variance(logits, c["log_small"], c["log_large"])
        return (mean + c["noise"] * jnp.exp(0.5 * log_variance) * noise,)


@dataclasses.dataclass(frozen=True)
class DDIM(OneStep):
    """x_{t'} = α' x_0 + √(1 − ᾱ' − s²) ε + s z with s² = η² (1 − ᾱ') / (1 − ᾱ) · (1 − ᾱ / ᾱ')
    (paper, eq. 12 and 16).

    ``steps``: N takes every ⌊T / N⌋-th time from 0 up (diffusers' "leading" spacing); 'ddimN' and
    sections are respacing.space_timesteps' (the same list where N divides T).

    eta: 0 is deterministic, 1 adds as much noise as DDPM. Without a key it counts as 0.
    set_alpha_to_one: the last step goes to ᾱ' = 1, the clean image; False: to the schedule's ᾱ_0,
    as in diffusers' option of that name.
    """

    eta: float = 0.0
    set_alpha_to_one: bool = True

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM.eta = {self.eta!r}: must lie in [0, 1]")

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        visited = self._times(schedule.timesteps, steps)
        check_start(start, len(visited))
        cumprod = schedule.alphas_cumprod[visited]
        last = 1.0 if self.set_alpha_to_one else schedule.alphas_cumprod[0]
        target = np.concatenate([[last], cumprod[:-1]])
        s = (self.eta if stochastic else 0.0) * np.sqrt(
            (1 - target) / (1 - cumprod) * (1 - cumprod / target)
        )
        alpha, sigma = np.sqrt(cumprod), np.sqrt(1 - cumprod)
        # ε = (x − α x_0) / σ, so x_{t'} is linear in x and x_0
        of_x = np.sqrt(1 - target - s**2) / sigma
        coefficients = {"x": of_x, "x0": np.sqrt(target) - of_x * alpha, "noise": s}
        order = np.arange(len(visited))[::-1][start:]
        return StepTable(
            t=visited[order].astype(np.float64),
            alpha=alpha[order],
            sigma=sigma[order],
            coefficients={name: values[order] for name, values in coefficients.items()},
            noisy=stochastic and self.eta > 0,
        )

    @staticmethod
    def _times(timesteps: int, steps: int | str) -> np.ndarray:
        if not str(steps).strip().isdigit():
            return space_timesteps(timesteps, steps)
        count = step_count(steps)
        if count > timesteps:
            raise UserError(f"steps = {steps!r}: the schedule has {timesteps} times")
        return np.arange(count) * (timesteps // count)

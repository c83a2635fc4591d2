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
    OnGrid,
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
class DDIM(OneStep, OnGrid):
    """x_{t'} = α' x_0 + √(1 − ᾱ' − s²) ε + s z with s² = η² (1 − ᾱ') / (1 − ᾱ) · (1 − ᾱ / ᾱ')
    (paper, eq. 12 and 16). In σ/α this is Euler's step, and with η = 1 the ancestral one of
    k-diffusion, so diffusers' Euler schedulers are DDIM on another grid.

    ``steps``: N takes every ⌊T / N⌋-th time from 0 up (diffusers' "leading" spacing, the default);
    'ddimN' and sections are respacing.space_timesteps' (the same list where N divides T).

    eta: 0 is deterministic, 1 adds as much noise as DDPM. Without a key it counts as 0.
    set_alpha_to_one: the last step goes to ᾱ' = 1, the clean image; False: to the schedule's ᾱ_0,
    as in diffusers' option of that name.
    """

    eta: float = 0.0
    set_alpha_to_one: bool = True
    _: dataclasses.KW_ONLY
    spacing: str = dataclasses.field(default="leading", compare=False)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UserError(f"DDIM.eta = {self.eta!r}: must lie in [0, 1]")

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        if not str(steps).strip().isdigit():
            visited = space_timesteps(schedule.timesteps, steps)[::-1]
            grid = dataclasses.replace(self, at=tuple(visited.tolist()))
        else:
            grid, visited = self, np.arange(step_count(steps))
        count = len(visited)
        check_start(start, count)
        t, alpha, sigma = grid.grid(schedule, count, False, False)
        if not self.set_alpha_to_one:
            alpha[-1], sigma[-1] = schedule.alpha(0.0), schedule.sigma(0.0)
        at, to = slice(start, count), slice(start + 1, None)
        noise = np.sqrt(np.maximum(1 - (alpha[at] / alpha[to]) ** 2, 0)) * sigma[to] / sigma[at]
        noise = noise * (self.eta if stochastic else 0.0)
        # ε = (x − α x_0) / σ, so x_{t'} is linear in x and x_0
        of_x = np.sqrt(sigma[to] ** 2 - noise**2) / sigma[at]
        return StepTable(
            t=t[at],
            alpha=alpha[at],
            sigma=sigma[at],
            coefficients={"x": of_x, "x0": alpha[to] - of_x * alpha[at], "noise": noise},
            noisy=stochastic and self.eta > 0,
        )


@dataclasses.dataclass(frozen=True)
class Heun(OnGrid):
    """Heun's method in σ/α (arXiv 2206.00364, algorithm 1 without its noise), as diffusers'
    HeunDiscreteScheduler: each step but the last, which is Euler's, takes a second evaluation at
    its end and averages the two slopes. 2 N − 1 evaluations in all."""

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        count = step_count(steps)
        check_start(start, count)
        t, alpha, sigma = (values[start:] for values in self.grid(schedule, count, False, False))
        ratio = sigma / alpha
        # Euler's step from x, and then from the mean of x before it and after it, half a step
        first = {"x": sigma[1:] / sigma[:-1], "before": np.zeros(count - start)}
        first["x0"] = alpha[1:] - first["x"] * alpha[:-1]
        half = (ratio[1:-1] - ratio[:-2]) / (2 * ratio[1:-1])
        second = {"x": 0.5 + half, "x0": -half * alpha[1:-1]}
        second["before"] = 0.5 * alpha[1:-1] / alpha[:-2]

        def woven(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return np.insert(one, np.arange(1, len(one)), other)

        return StepTable(
            t=woven(t, t[1:]),
            alpha=woven(alpha[:-1], alpha[1:-1]),
            sigma=woven(sigma[:-1], sigma[1:-1]),
            coefficients={name: woven(first[name], second[name]) for name in first},
            evaluations=2,
        )

    def init(self, x: Array) -> State:
        return (x, x)

    def update(
        self, state: State, x0: Array, logits: MaybeArray, c: dict[str, Array], noise: MaybeArray
    ) -> State:
        x, before = state
        return (c["x"] * x + c["x0"] * x0 + c["before"] * before, x)

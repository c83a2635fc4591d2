"""DDIM (arXiv 2010.02502)."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from pixart_jax.diffusion.respacing import space_timesteps
from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import State, StepTable, check_start, step_count
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DDIM:
    """x_{t'} = α' x_0 + √(1 − ᾱ' − s²) ε + s z with s² = η² (1 − ᾱ') / (1 − ᾱ) · (1 − ᾱ / ᾱ')
    (paper, eq. 12 and 16).

    ``steps``: N takes every ⌊T / N⌋-th time from 0 up (diffusers' "leading" spacing); 'ddimN' and
    sections are respacing.kept_times' (the same list where N divides T). Times are whole by
    construction. x_0 is not clipped.

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
        kept = self._times(schedule.timesteps, steps)
        check_start(start, len(kept))
        cumprod = schedule.alphas_cumprod[kept]
        last = 1.0 if self.set_alpha_to_one else schedule.alphas_cumprod[0]
        target = np.concatenate([[last], cumprod[:-1]])
        s = (self.eta if stochastic else 0.0) * np.sqrt(
            (1 - target) / (1 - cumprod) * (1 - cumprod / target)
        )
        alpha, sigma = np.sqrt(cumprod), np.sqrt(1 - cumprod)
        # ε = (x − α x_0) / σ, so x_{t'} is linear in x and x_0
        of_x = np.sqrt(1 - target - s**2) / sigma
        coefficients = {"x": of_x, "x0": np.sqrt(target) - of_x * alpha, "noise": s}
        order = np.arange(len(kept))[::-1][start:]
        return StepTable(
            t=kept[order].astype(np.float64),
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

    def init(self, x: jax.Array) -> State:
        return (x,)

    def update(
        self,
        state: State,
        x0: jax.Array,
        logits: jax.Array | None,
        c: dict[str, jax.Array],
        noise: jax.Array | None,
    ) -> State:
        x = c["x"] * state[0] + c["x0"] * x0
        return (x if noise is None else x + c["noise"] * noise,)

"""Latent consistency models (arXiv 2310.04378; PixArt-δ, arXiv 2401.05252): a distilled model
predicts the clean image at every time."""

from __future__ import annotations

import dataclasses

import numpy as np

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import OneStep, StepTable, check_start, step_count
from pixart_jax.errors import UserError

_SIGMA_DATA = 0.5
_TIME_SCALE = 10.0  # of whole times, so that the boundary condition is nearly a delta at 0


def scalings(t):
    """(c_skip, c_out) at times t, NumPy or JAX."""
    squares = (_TIME_SCALE * t) ** 2 + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / squares, _TIME_SCALE * t / squares**0.5


@dataclasses.dataclass(frozen=True)
class LCM(OneStep):
    """f = c_skip x + c_out x_0, then x at the next time is α' f + σ' z with fresh noise z; the last
    step ends at f.

    With s = 10 t: c_skip = ¼ / (s² + ¼), c_out = s / √(s² + ¼). Without a key no noise is added,
    which is right for one step only. Guidance was distilled into the model: use none here.

    ``steps``: N of the ``original_steps`` times that the model was distilled on (49, 99 … for 20 of
    1000). times: "fractional", every ⌊original_steps / N⌋-th from the noisiest down (official: 999,
    759, 519, 279 for 4), or "integer", spread over all of them (diffusers: 999, 759, 499, 259). The
    times are whole either way.
    """

    original_steps: int = 50

    def __post_init__(self):
        if self.original_steps < 1:
            raise UserError(f"LCM.original_steps = {self.original_steps!r}: must be at least 1")

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        count = step_count(steps)
        if count > self.original_steps or self.original_steps > schedule.timesteps:
            raise UserError(
                f"steps = {steps!r}: lcm takes at most the {self.original_steps} steps that its "
                "model was distilled on"
            )
        check_start(start, count)
        known = (np.arange(self.original_steps) + 1)[::-1] * (
            schedule.timesteps // self.original_steps
        ) - 1
        chosen = (
            np.arange(count) * (self.original_steps // count)
            if times == "fractional"
            else np.floor(np.arange(count) * self.original_steps / count)
        )
        t = known[chosen.astype(int)][start:]
        cumprod = schedule.alphas_cumprod[t]
        target = np.append(cumprod[1:], 1.0)
        skip, out = scalings(t)
        return StepTable(
            t=t.astype(np.float64),
            alpha=np.sqrt(cumprod),
            sigma=np.sqrt(1 - cumprod),
            coefficients={
                "x": np.sqrt(target) * skip,
                "x0": np.sqrt(target) * out,
                "noise": np.sqrt(1 - target),
            },
            noisy=stochastic and len(t) > 1,
        )

"""Distribution matching distillation (arXiv 2311.18828), for PixArt-Σ's one-step
checkpoints."""

from __future__ import annotations

import dataclasses

import numpy as np

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import OneStep, StepTable, check_start, step_count
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DMD(OneStep):
    """One evaluation at ``timestep``, of pure noise; its x_0 is the result. For use without
    guidance."""

    timestep: int = 400

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        if step_count(steps) != 1:
            raise UserError(f"steps = {steps!r}: dmd takes 1 step")
        check_start(start, 1)
        if not 0 <= self.timestep < schedule.timesteps:
            raise UserError(
                f"DMD.timestep = {self.timestep!r}: must lie in 0 … {schedule.timesteps - 1}"
            )
        cumprod = schedule.alphas_cumprod[[self.timestep]]
        return StepTable(
            t=np.array([float(self.timestep)]),
            alpha=np.sqrt(cumprod),
            sigma=np.sqrt(1 - cumprod),
            coefficients={"x": np.zeros(1), "x0": np.ones(1)},
        )

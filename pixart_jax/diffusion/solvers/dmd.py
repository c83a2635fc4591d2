"""Distribution matching distillation: DMD (arXiv 2311.18828), for PixArt's one-step checkpoints,
and its form for a few steps, TDM (arXiv 2503.06674)."""

from __future__ import annotations

import dataclasses

import numpy as np

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.ancestral import DDIM
from pixart_jax.diffusion.solvers.base import OneStep, StepTable, check_start, step_count
from pixart_jax.errors import UserError

_HORIZON = 900  # times; above them x_t is taken to be pure noise


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


@dataclasses.dataclass(frozen=True)
class TDM(DDIM):
    """DDIM without noise at the K times 900 k / K − 1 (899, 674, 449, 224 for 4), from pure noise
    at the first; for use without guidance. ``steps``: K, as the model was distilled to."""

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        count = step_count(steps)
        if _HORIZON % count or schedule.timesteps < _HORIZON:
            raise UserError(f"steps = {steps!r}: tdm takes a number that divides {_HORIZON}, as 4")
        at = np.arange(count, 0, -1.0) * (_HORIZON // count) - 1
        solver = DDIM(self.eta, self.set_alpha_to_one, at=tuple(at.tolist()))
        return solver.plan(schedule, steps, times=times, start=start, stochastic=stochastic)

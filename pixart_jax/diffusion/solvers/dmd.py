"""Distribution matching distillation (arXiv 2311.18828), as PixArt-Σ's one-step checkpoints are
drawn with."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import State, StepTable, check_start, step_count
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DMD:
    """One evaluation at time ``at``, of pure noise as it is; its x_0 is the result. No guidance is
    wanted, no noise is added."""

    timestep: int = 400

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        if step_count(steps) != 1:
            raise UserError(f"steps = {steps!r}: dmd draws in 1 step")
        check_start(start, 1)
        if not 0 <= self.timestep < schedule.timesteps:
            raise UserError(f"DMD.at = {self.timestep!r}: must lie in 0 … {schedule.timesteps - 1}")
        cumprod = schedule.alphas_cumprod[[self.timestep]]
        return StepTable(
            t=np.array([float(self.timestep)]),
            alpha=np.sqrt(cumprod),
            sigma=np.sqrt(1 - cumprod),
            coefficients={},
        )

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
        return (x0,)

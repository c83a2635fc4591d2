"""DPM-Solver++, multistep, data prediction (arXiv 2211.01095): PixArt's default.

From time s to t, with λ = log(α/σ), h = λ_t − λ_s and m_0, m_1, m_2 the implied x_0 at s and at the
two evaluations before it:

    order 1:  x_t = σ_t/σ_s x − α_t φ₁ m_0                           (DDIM)     φ₁ = e^{−h} − 1
    order 2:        … − ½ α_t φ₁ D_0                                 (midpoint)
    order 3:        … + α_t φ₂ D₁ − α_t φ₃ D₂          φ₂ = φ₁/h + 1, φ₃ = φ₂/h − ½

    D_0 = (m_0 − m_1) / r_0,   D_1 = (m_1 − m_2) / r_1,   r_i = h_i/h with h_0, h_1 the two steps
    before,   D₁ = D_0 + r_0/(r_0 + r_1) (D_0 − D_1),   D₂ = (D_0 − D_1) / (r_0 + r_1)

All of it is linear in x and the m's with weights that depend on the times alone.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import (
    MaybeArray,
    OnGrid,
    State,
    StepTable,
    check_start,
    push_history,
    step_count,
    to_lambda,
    weighted_sum,
)
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DPMSolver(OnGrid):
    """order: 1, 2 or 3. The first steps, which have no past, are of the order they can be.

    times='fractional', as the official code: x ends at time 0 (σ = 0.01); the order falls to 1
    towards the end under 10 steps. times='integer', as diffusers' DPMSolverMultistepScheduler
    (final σ 0): times are rounded and x ends at σ = 0, by a last step of order 1; under 15 steps
    the order falls towards it. Spacings 'leading' and 'trailing' are of integer times alone.
    """

    order: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise UserError(f"order {self.order!r}: must be 1, 2 or 3")

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        count = step_count(steps)
        check_start(start, count)
        fractional = times == "fractional"
        t, alpha, sigma = self.grid(schedule, count, fractional, not fractional)
        lam = to_lambda(alpha, sigma)
        i = np.arange(count)
        orders = np.minimum(self.order, i - start + 1)
        if count < (10 if fractional else 15):
            orders = np.minimum(orders, count - i)
        if not fractional:
            orders[-1] = 1
        of_x = sigma[1:] / sigma[:-1]
        of_past = np.stack(
            [self._weights(orders[k], lam[: k + 2]) * alpha[k + 1] for k in range(start, count)]
        )
        return StepTable(
            t=t[start:],
            alpha=alpha[start:count],
            sigma=sigma[start:count],
            coefficients={"x": of_x[start:], "past": of_past},
        )

    def _weights(self, order: int, lam: np.ndarray) -> np.ndarray:
        """Of m_0, m_1, … in x_t / α_t, [self.order], zero beyond ``order``; lam: λ up to and with
        the step's target."""
        h = lam[-1] - lam[-2]
        phi1 = np.expm1(-h)
        m = np.eye(3)  # m[j] picks m_j out of the three
        weights = -phi1 * m[0]
        if order >= 2:
            r0 = (lam[-2] - lam[-3]) / h
            d0 = (m[0] - m[1]) / r0
        if order == 2:
            weights = weights - 0.5 * phi1 * d0
        if order == 3:
            r1 = (lam[-3] - lam[-4]) / h
            d1 = (m[1] - m[2]) / r1
            phi2 = phi1 / h + 1
            phi3 = phi2 / h - 0.5
            weights = (
                weights + phi2 * (d0 + r0 / (r0 + r1) * (d0 - d1)) - phi3 * (d0 - d1) / (r0 + r1)
            )
        return weights[: self.order]

    def init(self, x: Array) -> State:
        return (x, (jnp.zeros_like(x),) * (self.order - 1))

    def update(
        self, state: State, x0: Array, logits: MaybeArray, c: dict[str, Array], noise: MaybeArray
    ) -> State:
        x, past = state
        return (c["x"] * x + weighted_sum(c["past"], (x0, *past)), push_history(x0, past))

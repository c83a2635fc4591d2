"""UniPC: a unified predictor–corrector, data prediction, B(h) = e^{−h} − 1 (arXiv 2302.04867,
algorithms 5 and 6; "bh2").

From s to t with h = λ_t − λ_s, φ₁ = e^{−h} − 1, m the implied x_0, and evaluations at times with
r_i = (λ_i − λ_s)/h before s (the corrector adds the one at t, r = 1):

    x_t = σ_t/σ_s x − α_t φ₁ (m_s + Σ_i ρ_i (m_i − m_s)/r_i)                                    (U1)
    Σ_i ρ_i r_i^{k−1} = k! φ_{k+1}/φ₁,  k = 1, 2, …      φ_{k+1} = φ_k/(−h) − 1/k!              (U2)

where a single ρ is ½.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.diffusion.solvers.base import (
    OnGrid,
    PredictorCorrector,
    StepTable,
    check_start,
    step_count,
    to_lambda,
)
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class UniPC(PredictorCorrector, OnGrid):
    """As diffusers' UniPCMultistepScheduler. order: of the predictor, 1 to 3; the first and the
    last steps are of the order they can be. The corrector is one order better and costs no
    evaluation. times: as of DPMSolver."""

    order: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise UserError(f"order {self.order!r}: must be 1, 2 or 3")

    @property
    def width(self) -> int:
        return self.order + 1

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        count = step_count(steps)
        check_start(start, count)
        fractional = times == "fractional"
        t, alpha, sigma = self.grid(schedule, count, fractional, not fractional)
        lam, left = to_lambda(alpha, sigma)[start:], count - start
        alpha, sigma = alpha[start:], sigma[start:]
        # evaluation k, at node k, corrects the step k − 1 → k (none at k = 0), predicts k → k + 1
        tables = {f"{part}_x": np.ones(left) for part in ("correct", "predict")}
        tables |= {f"{part}_past": np.zeros((left, self.width)) for part in ("correct", "predict")}
        for k in range(left):
            for part, s in (("correct", k - 1), ("predict", k)):
                if s >= 0:
                    order = min(self.order, left - s, s + 1)
                    tables[f"{part}_x"][k] = sigma[s + 1] / sigma[s]
                    weights = alpha[s + 1] * _weights(order, lam[: s + 2], part == "correct")
                    tables[f"{part}_past"][k, : len(weights)] = weights
        return StepTable(t[start:], alpha[:-1], sigma[:-1], tables)


def _weights(order: int, lam: np.ndarray, correct: bool) -> np.ndarray:
    """Of the m's in x_t / α_t by (U1), newest first: with m_t at its head in the corrector. lam: λ
    of the evaluations up to and with s, then of t."""
    h = lam[-1] - lam[-2]
    phi1 = np.expm1(-h)
    before = (lam[-2 - np.arange(1, order)] - lam[-2]) / h
    ratios = np.append(1.0, before) if correct else before
    rho = np.full(len(ratios), 0.5)
    if len(ratios) > 1:
        phi, right = phi1, []
        for k in range(1, len(ratios) + 1):
            phi = phi / -h - 1 / math.factorial(k)
            right.append(math.factorial(k) * phi / phi1)
        powers = np.arange(len(ratios))[:, None]
        rho = np.linalg.solve(ratios**powers, np.array(right))
    ends = rho / ratios
    weights = np.insert(ends, int(correct), 1 - ends.sum())  # of m_s: what the differences leave
    return -phi1 * weights

"""SA-Solver: a stochastic Adams predictor–corrector, data prediction (arXiv 2309.05019).

From s to t with h = λ_t − λ_s, τ constant over the step, a = 1 + τ², z ~ N(0, I) and L_j the
Lagrange polynomials over the λ of the evaluations used (the predictor's: at s and before; the
corrector's: at t and before), paper eq. 14 and 17:

    x_t = e^{−τ²h} σ_t/σ_s x_s + Σ_j b_j m_j + σ_t √(1 − e^{−2τ²h}) z                       (S1)
    b_j = a σ_t e^{−τ²λ_t} ∫_{λ_s}^{λ_t} e^{aλ} L_j(λ) dλ
        = a α_t ∫_{−h}^{0} e^{au} L_j(λ_t + u) du                                           (S2)

For two nodes λ_0, λ_1 the published few-step variant (paper, appendix D) moves weight, δ to the
first and −δ to the second:

    δ = a α_t (h²/2 − (ah − 1 + e^{−ah}) / a²) / (λ_0 − λ_1)                                (S3)

PEC: one evaluation a step. The model is evaluated at the predicted point, the step is redone with
that evaluation and the same z, and the next prediction starts from the corrected point.
"""

from __future__ import annotations

import dataclasses

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
class SASolver(PredictorCorrector):
    """The defaults are PixArt's published settings (with 25 steps and guidance 3).

    predictor_order, corrector_order: 1 to 4; the first and the last steps are of the order they can
    be.
    tau: how much noise, 0 is an ODE solver; it holds where the step's target time lies in
    tau_interval, a share of T, and is 0 elsewhere, at the last step, and without a key. Times are
    fractional.
    """

    predictor_order: int = 2
    corrector_order: int = 2
    tau: float = 1.0
    tau_interval: tuple[float, float] = (0.2, 0.8)

    def __post_init__(self):
        for name in ("predictor_order", "corrector_order"):
            if getattr(self, name) not in (1, 2, 3, 4):
                raise UserError(f"SASolver.{name} = {getattr(self, name)!r}: must be 1, 2, 3 or 4")
        if self.tau < 0:
            raise UserError(f"SASolver.tau = {self.tau!r}: must not be negative")

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        if times != "fractional":
            raise UserError(f"solver 'sa' has times='fractional' only, got {times!r}")
        count = step_count(steps)
        check_start(start, count)
        t, alpha, sigma = OnGrid().grid(schedule, count, True, False)
        t, alpha, sigma = np.append(t, 0.0)[start:], alpha[start:], sigma[start:]
        lam = to_lambda(alpha, sigma)
        low, high = self.tau_interval
        share = (t + 1) / schedule.timesteps
        tau = np.where((low <= share) & (share <= high), self.tau if stochastic else 0.0, 0.0)
        tau[-1] = 0.0  # the last step is a prediction without noise

        left = count - start
        width = self.width
        # Evaluation k, at node k, corrects the step k − 1 → k (none at k = 0) and predicts k → k +
        # 1.
        correct = {"x": np.ones(left), "past": np.zeros((left, width)), "noise": np.zeros(left)}
        predict = {"x": np.ones(left), "past": np.zeros((left, width)), "noise": np.zeros(left)}
        warm_up = max(self.predictor_order, self.corrector_order - 1)
        for k in range(left):
            target = k + 1
            order = min(
                self.predictor_order, target, left - target + 1 if target >= warm_up else target
            )
            _fill(predict, k, order, k, k + 1, k, tau[k + 1], alpha, sigma, lam)
            if k > 0:
                order = min(self.corrector_order, k + 1, left - k + 2 if k >= warm_up else k + 1)
                _fill(correct, k, order, k - 1, k, k, tau[k], alpha, sigma, lam)
        coefficients = {f"correct_{name}": table for name, table in correct.items()}
        coefficients |= {f"predict_{name}": table for name, table in predict.items()}
        return StepTable(
            t=t[:-1],
            alpha=alpha[:-1],
            sigma=sigma[:-1],
            coefficients=coefficients,
            noisy=stochastic and bool((tau > 0).any()),
        )

    @property
    def width(self) -> int:
        return max(2, self.predictor_order, self.corrector_order)


def _fill(tables, row, order, s, t, newest, tau, alpha, sigma, lam) -> None:
    """(S1) from node s to node t, with the evaluations at nodes newest, newest − 1, …, into ``row``
    of the tables."""
    h = lam[t] - lam[s]
    a = 1 + tau**2
    nodes = lam[newest - np.arange(order)]
    weights = a * alpha[t] * _integrals(a, h, nodes - lam[t])
    if order == 2:
        # (S3)
        shift = (
            a * alpha[t] * (h**2 / 2 - (a * h + np.expm1(-a * h)) / a**2) / (nodes[0] - nodes[1])
        )
        weights += np.array([shift, -shift])
    tables["x"][row] = np.exp(-(tau**2) * h) * sigma[t] / sigma[s]
    tables["past"][row, :order] = weights
    tables["noise"][row] = sigma[t] * np.sqrt(-np.expm1(-2 * tau**2 * h))


def _integrals(a: float, h: float, nodes: np.ndarray) -> np.ndarray:
    """∫_{−h}^{0} e^{au} L_j(u) du for the Lagrange polynomials L_j over ``nodes``; [len(nodes)]."""
    moments = [-np.expm1(-a * h) / a]  # of u^k, by parts
    for k in range(1, len(nodes)):
        moments.append((-((-h) ** k) * np.exp(-a * h) - k * moments[-1]) / a)
    out = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        polynomial = np.atleast_1d(np.poly(others)) / np.prod(node - others)  # highest power first
        out.append(np.dot(polynomial[::-1], moments))
    return np.asarray(out)

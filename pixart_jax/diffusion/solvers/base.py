"""A solver: a step table computed on the host, and an update that the sampling scan repeats.

A solver is a small frozen dataclass of its options. Everything that depends on the step list alone
is computed once, on the host, in float64 (its ``StepTable``) and scanned over; on the device each
update is a short linear combination. Every solver sees the model through the x_0 that its
prediction implies ((4), (5) of gaussian.py).

The state is a tuple. Its first item is x, where the denoiser is evaluated next and, after the last
step, the result; what follows is the solver's memory.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeAlias

import numpy as np
from jax import Array

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.errors import UserError

State = tuple
MaybeArray: TypeAlias = Array | None


@dataclasses.dataclass(frozen=True, eq=False)
class StepTable:
    """The n evaluations of a run, in the order they are made; float64."""

    t: np.ndarray  # [n] the model's time at each
    alpha: np.ndarray  # [n] α_t there
    sigma: np.ndarray  # [n] σ_t there
    coefficients: dict[str, np.ndarray]  # [n, …], the solver's own
    noisy: bool = False  # whether updates add noise


class Solver(Protocol):
    """The parts of a solver that the sampling scan uses."""

    def __hash__(self) -> int: ...

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        """The run from its step ``start`` on; start 0 is pure noise. stochastic False: the run adds
        no noise."""

    def init(self, x: Array) -> State:
        """The state before the first evaluation; x [b, …]."""

    def update(
        self, state: State, x0: Array, logits: MaybeArray, c: dict[str, Array], noise: MaybeArray
    ) -> State:
        """One step. x0: implied at state[0]. logits: of the variance, from a model with a learned
        range. c: this step's coefficients. noise: standard normal, like x, or None."""


class OneStep:
    """A solver without memory: x' = c_x x + c_x0 x_0, plus c_noise z where noise is added."""

    def init(self, x: Array) -> State:
        return (x,)

    def update(
        self, state: State, x0: Array, logits: MaybeArray, c: dict[str, Array], noise: MaybeArray
    ) -> State:
        x = c["x"] * state[0] + c["x0"] * x0
        return (x if noise is None else x + c["noise"] * noise,)


def step_count(steps: int | str) -> int:
    """``steps`` of a solver that takes a plain number; UserError for anything else."""
    try:
        count = int(steps)
    except ValueError:
        count = 0
    if count < 1 or count != float(steps):
        raise UserError(f"steps = {steps!r}: must be a whole number of at least 1")
    return count


def check_start(start: int, count: int) -> None:
    """UserError unless at least one of ``count`` steps is left from ``start`` on."""
    if not 0 <= start < count:
        raise UserError(f"start = {start}: must lie in 0 … {count - 1} for {count} steps")


def fractional_times(schedule: Schedule, steps: int) -> np.ndarray:
    """[steps + 1] times in equal steps from T − 1 to 0, as in the official samplers; 20 steps: 999,
    949.05, … 0."""
    return np.linspace(schedule.timesteps - 1, 0, steps + 1)


def lambda_grid(log_alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(α, σ, λ) at each log α, with λ of (3); +inf at σ = 0."""
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    with np.errstate(divide="ignore"):
        return alpha, sigma, log_alpha - np.log(sigma)


def push_history(x0: Array, past: tuple[Array, ...]) -> tuple[Array, ...]:
    """The memory of a multistep solver, newest first, with ``x0`` in and the oldest out."""
    return (x0, *past)[: len(past)]


def weighted_sum(weights: Array, values: tuple[Array, ...]) -> Array:
    """Σ_j weights[j] · values[j]; weights [k], k arrays of one shape."""
    return sum(weights[j] * value for j, value in enumerate(values))

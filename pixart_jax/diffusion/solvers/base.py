"""What a solver is: a plan made on the host, and an update that the sampling scan repeats.

A solver is a small frozen dataclass of its options. Everything that depends on the step list alone
is computed once, on the host, in float64 (its ``Plan``) and scanned over; on the device each update
is a short linear combination. Every solver sees the model through the x_0 that its prediction
implies ((4), (5) of gaussian.py).

The state is a tuple. Its first item is x, where the denoiser is evaluated next and, after the last
step, the result; what follows is the solver's memory.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import numpy as np

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.errors import UserError

State = tuple


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

    def plan(
        self, schedule: Schedule, steps: int | str, *, times: str, start: int, stochastic: bool
    ) -> StepTable:
        """The whole run from its step ``start`` on; start 0 is pure noise. stochastic False: the
        run adds no noise."""

    def init(self, x: jax.Array) -> State:
        """The state before the first evaluation; x [b, …]."""

    def update(
        self,
        state: State,
        x0: jax.Array,
        logits: jax.Array | None,
        c: dict[str, jax.Array],
        noise: jax.Array | None,
    ) -> State:
        """One step. x0: implied at state[0]. logits: of the variance, if the model gives them. c:
        this step's coefficients.
        noise: standard normal, like x, or None."""


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


def push_history(x0: jax.Array, past: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The memory of a multistep solver, newest first, with ``x0`` in and the oldest out."""
    return (x0, *past)[: len(past)]


def weighted_sum(weights: jax.Array, values: tuple[jax.Array, ...]) -> jax.Array:
    """Σ_j weights[j] · values[j]; weights [k], k arrays of one shape."""
    return sum(weights[j] * value for j, value in enumerate(values))

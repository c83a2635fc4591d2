"""A solver: a step table computed on the host, and an update that the sampling scan repeats.

A solver is a small frozen dataclass of its options. Everything that depends on the step list alone
is computed once, on the host, in float64 (its ``StepTable``) and scanned over; on the device each
update is a short linear combination. Every solver sees the model through the x_0 that its
prediction implies ((4), (5) of gaussian.py).

The state is a tuple. Its first item is x, where the denoiser is evaluated next and, after the last
step, the result; what follows is the solver's memory.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Protocol, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.errors import UserError, nearest

SPACINGS = ("linspace", "leading", "trailing", "karras", "exponential")
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
    evaluations: int = 1  # a step; the last step is one


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


class PredictorCorrector(abc.ABC):
    """Memory of a multistep solver that corrects each step with the evaluation at its end: (the
    predicted x, the corrected x one step back, the noise added since, past x_0 newest first).
    Coefficients: correct_ and predict_ x, past [width] and, where noise is added, noise."""

    @property
    @abc.abstractmethod
    def width(self) -> int:
        """How many x_0 an update combines, at least 2."""

    def init(self, x: Array) -> State:
        nothing = jnp.zeros_like(x)
        return (x, x, nothing, (nothing,) * (self.width - 1))

    def update(
        self, state: State, x0: Array, logits: MaybeArray, c: dict[str, Array], noise: MaybeArray
    ) -> State:
        _, x, added, past = state
        known = (x0, *past)
        x = c["correct_x"] * x + weighted_sum(c["correct_past"], known)
        if noise is not None:
            x = x + c["correct_noise"] * added
        predicted = c["predict_x"] * x + weighted_sum(c["predict_past"], known)
        if noise is not None:
            predicted, added = predicted + c["predict_noise"] * noise, noise
        return (predicted, x, added, push_history(x0, past))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnGrid:
    """A solver whose times may be chosen. They reach the compiled program through the step table
    alone, so solvers that differ in them are equal.

    spacing: diffusers' timestep_spacing, 'linspace', 'leading' or 'trailing'; or σ/α of the whole
    schedule in equal steps of its seventh root ('karras', arXiv 2206.00364, eq. 5) or of its
    logarithm ('exponential'). offset: diffusers' steps_offset, of 'leading'. at: the times
    themselves, of as many steps, from the noisiest down.
    """

    spacing: str = dataclasses.field(default="linspace", compare=False)
    offset: int = dataclasses.field(default=0, compare=False)
    at: tuple[float, ...] = dataclasses.field(default=(), compare=False)

    def __post_init__(self):
        if self.spacing not in SPACINGS:
            raise UserError(f"spacing {self.spacing!r} is unknown{nearest(self.spacing, SPACINGS)}")
        if self.at and not (np.diff((*self.at, -1)) < 0).all():
            listed = " ".join(f"{t:g}" for t in self.at)
            raise UserError(f"timesteps {listed}: they must fall, and not below 0")

    def grid(
        self, schedule: Schedule, count: int, ends_at_0: bool, whole: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(model times t [n], α [n + 1], σ [n + 1]) of n = ``count`` steps.

        ends_at_0: the run ends at time 0, a node of the spacing, as in the official samplers; else
        at σ = 0, as in diffusers. whole: times are rounded as by its multistep schedulers, α and σ
        of 'karras' and 'exponential' are not.
        """
        last = schedule.timesteps - 1
        if count > last + 1 and not ends_at_0:
            raise UserError(f"steps = {count!r}: the schedule has {last + 1} integer times")
        if self.at or self.spacing not in ("karras", "exponential"):
            t = self._times(last, count, ends_at_0, whole)
            log_alpha = schedule.log_alpha(t)
        else:
            table = np.sqrt(np.expm1(-2 * schedule.log_alpha(np.arange(last + 1.0))))  # σ / α
            root = (lambda s: s ** (1 / 7), lambda s: s**7)
            there, back = root if self.spacing == "karras" else (np.log, np.exp)
            ratio = back(np.linspace(there(table[-1]), there(table[0]), count + ends_at_0))
            log_alpha = -0.5 * np.log1p(ratio**2)
            t = np.interp(np.log(ratio), np.log(table), np.arange(last + 1.0))
            if whole:
                t = t.round() if self.spacing == "karras" else np.floor(t + 1e-6)
        log_alpha = log_alpha if ends_at_0 else np.append(log_alpha, 0.0)
        return t[:count], np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))

    def _times(self, last: int, count: int, ends_at_0: bool, whole: bool) -> np.ndarray:
        """The times of a list or of one of diffusers' spacings, with the 0 that a run may end
        at."""
        extra = int(ends_at_0 or whole)
        if self.at:
            t = np.append(self.at, [0.0] * ends_at_0)
            if len(self.at) != count or t[0] > last or t[-2:].tolist() == [0.0, 0.0]:
                allowed = f"{last} … 0" + ", above 0, where the run ends" * ends_at_0
                raise UserError(
                    f"timesteps: {len(self.at)} from {self.at[0]:g} to {self.at[-1]:g} do not fit "
                    f"{count} steps of times {allowed}"
                )
            return t
        if ends_at_0:
            return np.linspace(last, 0, count + 1)
        if self.spacing == "linspace":
            t = np.linspace(last, 0, count + extra)[:count]
            return t.round() if whole else t
        if self.spacing == "leading":
            stride = (last + 1) // (count + extra)
            return np.arange(count - 1 + extra, extra - 1, -1.0) * stride + self.offset
        return np.arange(last + 1, 0, -(last + 1) / count).round()[:count] - 1


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


def to_lambda(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """λ of (3); +inf at σ = 0."""
    with np.errstate(divide="ignore"):
        return np.log(alpha) - np.log(sigma)


def push_history(x0: Array, past: tuple[Array, ...]) -> tuple[Array, ...]:
    """The memory of a multistep solver, newest first, with ``x0`` in and the oldest out."""
    return (x0, *past)[: len(past)]


def weighted_sum(weights: Array, values: tuple[Array, ...]) -> Array:
    """Σ_j weights[j] · values[j]; weights [k], k arrays of one shape."""
    return sum(weights[j] * value for j, value in enumerate(values))

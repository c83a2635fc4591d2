"""A model folder's scheduler/: the diffusion process that its transformer was trained for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.diffusion import Schedule, schedule, solvers
from pixart_jax.errors import UserError
from pixart_jax.files import write_json
from pixart_jax.pipeline.sampling_config import OF_SCHEDULERS, SamplingConfig, check_choice

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' name: ours
_BETAS = {"linear": schedule.linear, "scaled_linear": schedule.scaled_linear}
DPM_SCHEDULER, LCM_SCHEDULER = "DPMSolverMultistepScheduler", "LCMScheduler"
_COSINE = "squaredcos_cap_v2"
_SIGMAS = ("karras", "exponential")
# the first three of every class
_REFUSED = (
    *("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas"),
    *("use_beta_sigmas", "use_lu_lambdas"),
)


def class_of(solver: str | None) -> str:
    """diffusers' scheduler for a model of that solver."""
    classes = {solver: kind for kind, solver in OF_SCHEDULERS.items()} | {"lcm": LCM_SCHEDULER}
    return classes.get(str(solver), DPM_SCHEDULER)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """prediction: 'epsilon' or 'v'. The betas run from beta_start to beta_end over ``timesteps``;
    beta_schedule as diffusers names it. order: of dpm++ and unipc. spacing, offset: of the times
    (solvers.OnGrid)."""

    prediction: str = "epsilon"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    order: int = 2
    spacing: str = "linspace"
    offset: int = 0

    def __post_init__(self):
        check_choice("prediction", self.prediction, tuple(_PREDICTIONS.values()))
        check_choice("beta_schedule", self.beta_schedule, (*_BETAS, _COSINE))
        check_choice("timestep_spacing", self.spacing, solvers.SPACINGS)
        if self.timesteps < 1:
            raise UserError(f"num_train_timesteps = {self.timesteps}: must be at least 1")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], path: str | os.PathLike) -> SchedulerConfig:
        """From any diffusers scheduler's config, PixArt's values for what it leaves out. Raises
        UserError, naming ``path``, for what is not supported."""
        prediction = values.get("prediction_type", "epsilon")
        check_choice(f"{path}: prediction_type", prediction, tuple(_PREDICTIONS))
        kind = values.get("_class_name", "")
        # times and sigmas of other classes are not read
        known = kind in OF_SCHEDULERS or kind.startswith("DPMSolver")
        sigmas = [name for name in _SIGMAS if known and values.get(f"use_{name}_sigmas")]
        sigmas = [] if kind.startswith("EulerAncestral") else sigmas  # as diffusers
        wanted: dict[str, Any] = dict.fromkeys(_REFUSED[: None if known else 3])
        if known:
            wanted |= {"interpolation_type": "linear", "timestep_type": "discrete"}
            wanted |= {"final_sigmas_type": "zero"}
        if kind.startswith("UniPC"):
            wanted |= {"solver_type": "bh2"}
        if sigmas and kind.startswith(("Euler", "Heun")):  # between other ends than ours
            wanted |= {"timestep_spacing": "linspace"}
        for field, usual in wanted.items():
            if (found_here := values.get(field) or usual) != usual:
                beside = f" {found_here!r} with use_{sigmas[0]}_sigmas" if sigmas else ""
                raise UserError(
                    f"{path}: {field}{beside} is not supported: betas are given by beta_start, "
                    "beta_end and beta_schedule, times by timestep_spacing, use_karras_sigmas or "
                    "use_exponential_sigmas"
                )
        names = ("beta_start", "beta_end", "beta_schedule")
        found = {name: values[name] for name in names if name in values}
        theirs = {"timesteps": "num_train_timesteps", "order": "solver_order"}
        if known:
            theirs |= {"spacing": "timestep_spacing", "offset": "steps_offset"}
        found |= {ours: values[name] for ours, name in theirs.items() if name in values}
        found |= {"spacing": sigmas[0]} if sigmas else {}
        return cls(_PREDICTIONS[prediction], **found)

    def write(self, folder: str | os.PathLike, solver: str | None = None) -> None:
        """A scheduler_config.json that makes diffusers sample with these betas and this prediction
        by the class of that solver, else by DPM-Solver++. Of order 1, and with the pipeline's
        ``timesteps``, the latter samples as solver 'tdm'."""
        theirs = {ours: name for name, ours in _PREDICTIONS.items()}
        kind = class_of(solver)
        content: dict[str, Any] = {
            "_class_name": kind,
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "num_train_timesteps": self.timesteps,
            "prediction_type": theirs[self.prediction],
        }
        of_lcm = {
            "clip_sample": False,
            "original_inference_steps": 50,
            "set_alpha_to_one": True,
            "timestep_scaling": 10.0,
        }
        of_grid = {
            "steps_offset": self.offset,
            "timestep_spacing": "linspace" if self.spacing in _SIGMAS else self.spacing,
        }
        if self.spacing in _SIGMAS:
            of_grid[f"use_{self.spacing}_sigmas"] = True
        if kind.startswith(("DPM", "UniPC")):
            order = 1 if solver == "tdm" else self.order
            of_grid |= {"lower_order_final": True, "solver_order": order}
        if kind == DPM_SCHEDULER:
            of_grid |= {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
        content |= of_lcm if kind == LCM_SCHEDULER else of_grid
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "scheduler_config.json", dict(sorted(content.items())))

    def solver(self, config: SamplingConfig) -> solvers.Solver:
        """The solver that a config names, at the config's times, else at this folder's."""
        name, times = str(config.solver), dict[str, Any]()
        order = self.order if config.order is None else config.order
        if config.spacing is not None:
            times["spacing"] = config.spacing
        elif name in OF_SCHEDULERS.values():
            times = {"spacing": self.spacing, "offset": self.offset}
        if config.timesteps is not None:
            times["at"] = config.timesteps
        return solvers.by_name(name, order=order, **times)

    def schedule(self) -> Schedule:
        """The noise schedule; the same settings give the same object."""
        if self.beta_schedule == _COSINE:
            return schedule.cosine(self.timesteps)
        return _BETAS[self.beta_schedule](self.timesteps, self.beta_start, self.beta_end)

"""A model folder's scheduler/: the diffusion process that its transformer was trained for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.diffusion import Schedule, schedule, solvers
from pixart_jax.diffusion.solvers.dpm import SPACINGS
from pixart_jax.errors import UserError
from pixart_jax.files import write_json
from pixart_jax.pipeline.sampling_config import check_choice

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' name: ours
_BETAS = {"linear": schedule.linear, "scaled_linear": schedule.scaled_linear}
DPM_SCHEDULER, LCM_SCHEDULER = "DPMSolverMultistepScheduler", "LCMScheduler"
_COSINE = "squaredcos_cap_v2"


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """prediction: 'epsilon' or 'v'. The betas run from beta_start to beta_end over ``timesteps``;
    beta_schedule as diffusers names it. order, spacing, offset: of dpm++ (solvers.DPMSolver)."""

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
        check_choice("timestep_spacing", self.spacing, SPACINGS)
        if self.timesteps < 1:
            raise UserError(f"num_train_timesteps = {self.timesteps}: must be at least 1")

    @classmethod
    def from_json(cls, values: Mapping[str, Any], path: str | os.PathLike) -> SchedulerConfig:
        """From any diffusers scheduler's config, PixArt's values for what it leaves out. Raises
        UserError, naming ``path``, for what is not supported."""
        prediction = values.get("prediction_type", "epsilon")
        check_choice(f"{path}: prediction_type", prediction, tuple(_PREDICTIONS))
        # its times and sigmas hold for dpm++ alone
        dpm = values.get("_class_name", "").startswith("DPMSolver")
        refused = ["trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas"]
        if dpm:
            refused += ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]
            refused += ["use_lu_lambdas"]
        for field in refused:
            if values.get(field):
                raise UserError(
                    f"{path}: {field} is not supported: beta_start, beta_end and beta_schedule are"
                )
        names = ("beta_start", "beta_end", "beta_schedule")
        found = {name: values[name] for name in names if name in values}
        theirs = {"timesteps": "num_train_timesteps", "order": "solver_order"}
        if dpm:
            theirs |= {"spacing": "timestep_spacing", "offset": "steps_offset"}
        found |= {ours: values[name] for ours, name in theirs.items() if name in values}
        return cls(_PREDICTIONS[prediction], **found)

    def write(self, folder: str | os.PathLike, solver: str | None = None) -> None:
        """A scheduler_config.json that makes diffusers sample with these betas and this prediction
        by DPM-Solver++, of order 2, or of a model of solver 'lcm' by LCMScheduler. Of order 1, and
        with the pipeline's ``timesteps``, the former samples as solver 'tdm'."""
        theirs = {ours: name for name, ours in _PREDICTIONS.items()}
        content: dict[str, Any] = {
            "beta_end": self.beta_end,
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "num_train_timesteps": self.timesteps,
            "prediction_type": theirs[self.prediction],
        }
        of_lcm = {
            "_class_name": LCM_SCHEDULER,
            "clip_sample": False,
            "original_inference_steps": 50,
            "set_alpha_to_one": True,
            "timestep_scaling": 10.0,
        }
        of_dpm = {
            "_class_name": DPM_SCHEDULER,
            "algorithm_type": "dpmsolver++",
            "lower_order_final": True,
            "solver_order": 1 if solver == "tdm" else self.order,
            "solver_type": "midpoint",
            "steps_offset": self.offset,
            "timestep_spacing": self.spacing,
        }
        content |= of_lcm if solver == "lcm" else of_dpm
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "scheduler_config.json", dict(sorted(content.items())))

    def solver(self, name: str, order: int | None = None) -> solvers.Solver:
        """The solver of that name, dpm++ with this folder's options; order: another one."""
        if name != "dpm++":
            return solvers.by_name(name)
        return solvers.DPMSolver(self.order if order is None else order, self.spacing, self.offset)

    def schedule(self) -> Schedule:
        """The noise schedule; the same settings give the same object."""
        if self.beta_schedule == _COSINE:
            return schedule.cosine(self.timesteps)
        return _BETAS[self.beta_schedule](self.timesteps, self.beta_start, self.beta_end)

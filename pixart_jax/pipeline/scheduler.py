"""What a model folder's scheduler/ says of the diffusion that its transformer was trained for."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from pixart_jax.diffusion import Schedule, schedule, solvers
from pixart_jax.diffusion.solvers.dpm import SPACINGS
from pixart_jax.errors import UserError, nearest

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}  # diffusers' name: ours
_BETAS = {"linear": schedule.linear, "scaled_linear": schedule.scaled_linear}


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """prediction: 'epsilon' or 'v'. The betas run from beta_start to beta_end over ``timesteps``;
    beta_schedule as diffusers names it.
    order: of dpm++. spacing, offset: of its integer times (solvers.DPMSolver)."""

    prediction: str = "epsilon"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    order: int = 2
    spacing: str = "linspace"
    offset: int = 0

    def __post_init__(self):
        if self.prediction not in _PREDICTIONS.values():
            raise UserError(
                f"prediction {self.prediction!r} is "
                f"unknown{nearest(self.prediction, _PREDICTIONS.values())}"
            )
        if self.beta_schedule not in (*_BETAS, "squaredcos_cap_v2"):
            raise UserError(
                f"beta_schedule {self.beta_schedule!r} is "
                f"unknown{nearest(self.beta_schedule, (*_BETAS, 'squaredcos_cap_v2'))}"
            )
        if self.spacing not in SPACINGS:
            raise UserError(
                f"timestep_spacing {self.spacing!r} is unknown{nearest(self.spacing, SPACINGS)}"
            )
        if self.timesteps < 1:
            raise UserError(f"num_train_timesteps = {self.timesteps}: must be at least 1")

    def solver(self, name: str, order: int | None = None) -> solvers.Solver:
        """The solver of that name, with what the folder says of dpm++; order: another one."""
        if name != "dpm++":
            return solvers.by_name(name)
        return solvers.DPMSolver(self.order if order is None else order, self.spacing, self.offset)

    def schedule(self) -> Schedule:
        """The noise schedule; the same settings give the same object."""
        if self.beta_schedule == "squaredcos_cap_v2":
            return schedule.cosine(self.timesteps)
        return _BETAS[self.beta_schedule](self.timesteps, self.beta_start, self.beta_end)


def read(folder: str | os.PathLike) -> SchedulerConfig:
    """The settings of ``folder``/scheduler_config.json, any diffusers scheduler's; what it leaves
    out is PixArt's."""
    path = Path(folder) / "scheduler_config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no {path}: it says what the model predicts (prediction_type) and its betas"
        ) from None
    except ValueError as fault:
        raise UserError(f"{path} is no JSON: {fault}") from None
    prediction = found.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise UserError(
            f"{path}: prediction_type {prediction!r} is not "
            f"supported{nearest(prediction, _PREDICTIONS)}"
        )
    # what it says of its times holds for dpm++ alone
    dpm = found.get("_class_name", "").startswith("DPMSolver")
    sigmas = (
        ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
        if dpm
        else ()
    )
    for field in ("trained_betas", "rescale_betas_zero_snr", "use_flow_sigmas", *sigmas):
        if found.get(field):
            known = (
                "betas are given by beta_start, beta_end and beta_schedule, times by "
                "timestep_spacing"
            )
            raise UserError(f"{path}: {field} is not supported: {known}")
    default = SchedulerConfig()
    return SchedulerConfig(
        prediction=_PREDICTIONS[prediction],
        timesteps=int(found.get("num_train_timesteps", default.timesteps)),
        beta_start=float(found.get("beta_start", default.beta_start)),
        beta_end=float(found.get("beta_end", default.beta_end)),
        beta_schedule=found.get("beta_schedule", default.beta_schedule),
        order=int(found.get("solver_order", default.order)),
        spacing=found.get("timestep_spacing", default.spacing) if dpm else default.spacing,
        offset=int(found.get("steps_offset", default.offset)) if dpm else default.offset,
    )


def write(config: SchedulerConfig, folder: str | os.PathLike) -> None:
    """A scheduler_config.json that makes diffusers sample by DPM-Solver++ of order 2, with these
    betas and this prediction."""
    theirs = {ours: name for name, ours in _PREDICTIONS.items()}
    content = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "beta_end": config.beta_end,
        "beta_schedule": config.beta_schedule,
        "beta_start": config.beta_start,
        "lower_order_final": True,
        "num_train_timesteps": config.timesteps,
        "prediction_type": theirs[config.prediction],
        "solver_order": config.order,
        "solver_type": "midpoint",
        "steps_offset": config.offset,
        "timestep_spacing": config.spacing,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "scheduler_config.json").write_text(json.dumps(content, indent=2) + "\n")

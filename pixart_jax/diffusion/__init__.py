"""The diffusion process around a denoiser function: schedule, objective, guidance, solvers and the
sampling scan. Independent of any model."""

from pixart_jax.diffusion import guidance, schedule, solvers
from pixart_jax.diffusion.gaussian import add_noise, to_epsilon, to_x0, velocity
from pixart_jax.diffusion.guidance import classifier_free_guidance
from pixart_jax.diffusion.objective import training_loss
from pixart_jax.diffusion.posterior import ddpm_posterior
from pixart_jax.diffusion.sampling import Known, Segment, sample, timesteps
from pixart_jax.diffusion.schedule import Schedule

__all__ = [
    "Known",
    "Schedule",
    "Segment",
    "add_noise",
    "ddpm_posterior",
    "guidance",
    "classifier_free_guidance",
    "sample",
    "schedule",
    "solvers",
    "timesteps",
    "to_epsilon",
    "to_x0",
    "training_loss",
    "velocity",
]

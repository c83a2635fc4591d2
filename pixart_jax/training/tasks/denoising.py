"""What both diffusion tasks share: latents from the stored posterior, noise, times, and the loss of
a denoiser's output."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from pixart_jax import diffusion
from pixart_jax.config import ObjectiveConfig
from pixart_jax.diffusion import schedule
from pixart_jax.pipeline.scheduler import SchedulerConfig


class NoisedBatch(NamedTuple):
    """A batch made ready for the denoiser."""

    x_t: jax.Array  # [b, h, w, c]
    t: jax.Array  # [b] int32
    x0: jax.Array  # [b, h, w, c] scaled latents
    noise: jax.Array  # [b, h, w, c]
    dropped: jax.Array  # [b] bool: shown without its condition


@dataclasses.dataclass(frozen=True)
class DiffusionObjective:
    """The diffusion of a stage. scaling_factor: the VAE's."""

    objective: ObjectiveConfig
    scaling_factor: float

    @property
    def schedule(self) -> diffusion.Schedule:
        return schedule.linear(
            self.objective.timesteps, self.objective.beta_start, self.objective.beta_end
        )

    @property
    def scheduler(self) -> SchedulerConfig:
        """The same as a model folder says it."""
        o = self.objective
        return SchedulerConfig(o.prediction, o.timesteps, o.beta_start, o.beta_end)

    def prepare(self, batch: dict[str, jax.Array], keys: jax.Array) -> NoisedBatch:
        """batch: mean, std fp32 [b, h, w, c] of the unscaled posterior. keys: [b]; each sample's
        draws come from its own key alone.

        The posterior is sampled anew each time a picture is seen, t is uniform, and a share
        condition_dropout is marked.
        """

        def draw(mean, std, key):
            posterior, time, noise, drop = jax.random.split(key, 4)
            x0 = (mean + std * jax.random.normal(posterior, mean.shape)) * self.scaling_factor
            t = jax.random.randint(time, (), 0, self.objective.timesteps)
            return (
                x0,
                t,
                jax.random.normal(noise, mean.shape),
                jax.random.bernoulli(drop, self.objective.condition_dropout),
            )

        x0, t, noise, dropped = jax.vmap(draw)(batch["mean"], batch["std"], keys)
        return NoisedBatch(diffusion.add_noise(x0, noise, t, self.schedule), t, x0, noise, dropped)

    def losses(self, output: jax.Array, made: NoisedBatch) -> dict[str, jax.Array]:
        """{"loss", "mse", "vb"}, [b] each. output: the denoiser's, [b, h, w, 2c]."""
        o = self.objective
        terms = diffusion.training_loss(
            output,
            made.x0,
            made.noise,
            made.t,
            schedule=self.schedule,
            prediction=o.prediction,
            learned_range=o.learned_range,
            min_snr_gamma=o.min_snr_gamma,
        )
        return {"loss": terms["mse"] + terms["vb"], **terms}

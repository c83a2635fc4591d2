"""What both diffusion tasks share: latents from the stored posterior, noise, timesteps, and the
loss of a denoiser's output."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from pixart_jax.config import ObjectiveConfig, StageConfig
from pixart_jax.diffusion import schedule
from pixart_jax.diffusion.gaussian import add_noise
from pixart_jax.diffusion.objective import training_loss
from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig


class NoisedBatch(NamedTuple):
    """A batch as the denoiser sees it."""

    x_t: jax.Array  # [b, h, w, c]
    t: jax.Array  # [b] int32
    x0: jax.Array  # [b, h, w, c] scaled latents
    noise: jax.Array  # [b, h, w, c]
    dropped: jax.Array  # [b] bool: trained without its text or class
    condition: jax.Array | None = None  # [b, h, w, c] scaled latents of a ControlNet's condition


@dataclasses.dataclass(frozen=True)
class DiffusionObjective:
    """The diffusion of a stage. scaling_factor, shift_factor: the VAE's."""

    objective: ObjectiveConfig
    scaling_factor: float
    shift_factor: float = 0.0

    @property
    def schedule(self) -> schedule.Schedule:
        o = self.objective
        return schedule.linear(o.timesteps, o.beta_start, o.beta_end)

    @property
    def scheduler(self) -> SchedulerConfig:
        """The same in the form of a model folder."""
        o = self.objective
        return SchedulerConfig(o.prediction, o.timesteps, o.beta_start, o.beta_end)

    def prepare(self, batch: dict[str, jax.Array], keys: jax.Array) -> NoisedBatch:
        """Sample latents, timesteps and noise: the posterior anew at every visit, t uniform, and a
        share condition_dropout marked as dropped.

        batch: mean, std fp32 [b, h, w, c] of the unscaled posterior; control_mean, control_std of
        the condition, where there is one, sampled in the same way. keys: [b]; a sample's random
        numbers come from its own key alone.
        """

        def latents(mean, std, key):
            sampled = mean + std * jax.random.normal(key, mean.shape)
            return (sampled - self.shift_factor) * self.scaling_factor

        def draw(mean, std, key):
            posterior, time, noise, drop = jax.random.split(key, 4)
            x0 = latents(mean, std, posterior)
            t = jax.random.randint(time, (), 0, self.objective.timesteps)
            eps = jax.random.normal(noise, mean.shape)
            return x0, t, eps, jax.random.bernoulli(drop, self.objective.condition_dropout)

        x0, t, noise, dropped = jax.vmap(draw)(batch["mean"], batch["std"], keys)
        condition = None
        if "control_mean" in batch:
            own = jax.vmap(lambda key: jax.random.fold_in(key, 6))(keys)  # 5: class images
            condition = jax.vmap(latents)(batch["control_mean"], batch["control_std"], own)
        x_t = add_noise(x0, noise, t, self.schedule)
        return NoisedBatch(x_t, t, x0, noise, dropped, condition)

    def losses(self, output: jax.Array, noised: NoisedBatch) -> dict[str, jax.Array]:
        """{"loss", "mse", "vb"}, [b] each. output: the denoiser's, [b, h, w, 2c]."""
        o = self.objective
        terms = training_loss(
            output,
            noised.x0,
            noised.noise,
            noised.t,
            schedule=self.schedule,
            prediction=o.prediction,
            learned_range=o.learned_range,
            min_snr_gamma=o.min_snr_gamma,
        )
        return {"loss": terms["mse"] + terms["vb"], **terms}


def stage_model(model: TransformerConfig, stage: StageConfig) -> TransformerConfig:
    """The model's config with the stage's positions, which are computed and not learned; UserError
    where its output has no room for a learned range."""
    if stage.objective.learned_range and model.out_channels != 2 * model.in_channels:
        raise UserError(
            f"model.out_channels = {model.out_channels}: a learned range needs "
            f"{2 * model.in_channels}"
        )
    return with_stage_positions(model, stage)


def with_stage_positions(model: TransformerConfig, stage: StageConfig) -> TransformerConfig:
    """The model's config with the stage's position_base and position_scale where it sets them."""
    positions = {"position_base": stage.position_base, "position_scale": stage.position_scale}
    changes: dict[str, Any] = {name: v for name, v in positions.items() if v is not None}
    return dataclasses.replace(model, **changes)

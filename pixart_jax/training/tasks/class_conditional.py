"""Task 'class_conditional': the DiT learns what pictures are made of, under their class (stage
1)."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax import diffusion
from pixart_jax.config import Config, PreviewConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.images import to_uint8
from pixart_jax.models.dit import DiT, DiTConfig
from pixart_jax.models.geometry import BackboneConfig
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.training.export import write_parts
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.training.tasks.text_to_image import with_stage_positions
from pixart_jax.weights import component

_PREVIEWS = 8


@dataclasses.dataclass(frozen=True)
class ClassConditional:
    """Batches: mean, std fp32 [b, h, w, c], label int32 [b]."""

    module: DiT
    denoising: DiffusionObjective
    frozen: Frozen

    def init(self, key: jax.Array):
        """Fresh boxed parameters; also for jax.eval_shape."""
        c = self.module.config
        return self.module.init(
            key,
            jnp.zeros((1, c.patch_size, c.patch_size, c.in_channels)),
            jnp.zeros((1,)),
            jnp.zeros((1,), jnp.int32),
        )["params"]

    def adjust(self, params):
        """Nothing to set before a stage."""
        return params

    def losses(self, params, batch, keys) -> dict[str, jax.Array]:
        """loss = mse + vb, one value a sample; a dropped or missing label is "no class"."""
        made = self.denoising.prepare(batch, keys)
        none = self.module.config.num_classes
        labels = jnp.where(made.dropped | (batch["label"] < 0), none, batch["label"])
        params = component.DiT.cast_for_compute(params, self.module.dtype)
        output = self.module.apply({"params": params}, made.x_t, made.t.astype(jnp.float32), labels)
        return self.denoising.losses(output, made)

    def preview(self, params, batch, settings: PreviewConfig) -> tuple[list[np.ndarray], list[str]]:
        """Pictures of the batch's first classes."""
        none = self.module.config.num_classes
        labels = np.asarray(batch["label"][:_PREVIEWS])
        labels = np.where(labels < 0, none, labels)
        shape = np.shape(batch["mean"])[1:]
        latents = _draw(
            self.module,
            self.denoising,
            settings.steps,
            settings.guidance,
            shape,
            params,
            labels,
            jax.random.key(settings.seed),
        )
        images = gather_to_host(self.frozen.vae.decode(latents / self.denoising.scaling_factor))
        return list(to_uint8(images)), [f"class {n}" for n in labels]

    def component(self, params):
        """The DiT bound to parameters, as load_component gives one."""
        return component.DiT(self.module.config, params, self.module.dtype)

    def export(self, params, folder: Path, batches) -> None:
        """folder/transformer, the DiT, with the VAE and scheduler beside it."""
        write_parts(folder, self.component(params), self.denoising.scheduler, self.frozen)


def make(config: Config, stage: StageConfig, dtype: jnp.dtype, frozen: Frozen) -> ClassConditional:
    model = with_stage_positions(config.model, stage)
    geometry = {
        field.name: getattr(model, field.name) for field in dataclasses.fields(BackboneConfig)
    }
    if stage.objective.learned_range and model.out_channels != 2 * model.in_channels:
        raise UserError(
            f"model.out_channels = {model.out_channels}: a learned range needs "
            f"{2 * model.in_channels}"
        )
    sizes = DiTConfig(**geometry, num_classes=config.num_classes)
    module = DiT(
        sizes, dtype=dtype, remat=config.remat, context_attention=config.mesh.context_attention
    )
    return ClassConditional(
        module, DiffusionObjective(stage.objective, frozen.scaling_factor), frozen
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _draw(
    module: DiT,
    denoising: DiffusionObjective,
    steps: int,
    guidance: float,
    shape: tuple[int, ...],
    params,
    labels,
    key,
) -> jax.Array:
    """Latents [b, *shape] of labels [b]; one executable a stage and size, however often it is
    called."""
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(
        jnp.arange(len(labels))
    )
    doubled = jnp.concatenate([jnp.full_like(labels, module.config.num_classes), labels])

    def both(x, t):
        return module.apply({"params": params}, x, t, doubled)

    def alone(x, t):
        return module.apply({"params": params}, x, t, labels)

    denoiser = diffusion.classifier_free_guidance(both, guidance, conditional=alone)
    return diffusion.sample(
        denoiser,
        noise,
        steps=steps,
        schedule=denoising.schedule,
        prediction=denoising.objective.prediction,
    )

"""Task 'class_conditional': the DiT learns to denoise latents under a class (stage 1)."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax import diffusion
from pixart_jax.config import Config, PreviewConfig, StageConfig
from pixart_jax.finite import check_images
from pixart_jax.images import to_uint8
from pixart_jax.models.configs import BackboneConfig, DiTConfig
from pixart_jax.models.dit import DiT
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.tasks.denoising import DiffusionObjective, stage_model
from pixart_jax.weights import component

_PREVIEWS = 8


@dataclasses.dataclass(frozen=True)
class ClassConditional:
    """Batches: mean, std fp32 [b, h, w, c], label int32 [b]."""

    module: DiT
    denoising: DiffusionObjective
    frozen: Frozen

    @classmethod
    def from_config(
        cls, config: Config, stage: StageConfig, dtype: jnp.dtype, frozen: Frozen
    ) -> ClassConditional:
        """The DiT of the same geometry as config.model."""
        model = stage_model(config.model, stage)
        names = [field.name for field in dataclasses.fields(BackboneConfig)]
        geometry = {name: getattr(model, name) for name in names}
        module = DiT(
            DiTConfig(**geometry, num_classes=config.num_classes),
            dtype=dtype,
            remat=config.remat,
            context_attention=config.mesh.context_attention,
        )
        return cls(module, DiffusionObjective(stage.objective, *frozen.scaling), frozen)

    def init(self, key: jax.Array):
        """Fresh boxed parameters; also for jax.eval_shape."""
        c = self.module.config
        latents = jnp.zeros((1, c.patch_size, c.patch_size, c.in_channels))
        return self.module.init(key, latents, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32))["params"]

    def on_stage_start(self, params, base=None):
        """Return the parameters as they are: nothing to set before a stage."""
        return params

    def losses(self, params, batch, keys, base=None) -> dict[str, jax.Array]:
        """loss = mse + vb, one value a sample; a dropped or missing label is "no class"."""
        noised = self.denoising.prepare(batch, keys)
        none = self.module.config.num_classes
        labels = jnp.where(noised.dropped | (batch["label"] < 0), none, batch["label"])
        params = component.DiT.cast_for_compute(params, self.module.dtype)
        t = noised.t.astype(jnp.float32)
        output = self.module.apply({"params": params}, noised.x_t, t, labels)
        return self.denoising.losses(output, noised)

    def preview(
        self, params, batch, settings: PreviewConfig, base=None
    ) -> tuple[list[np.ndarray], list[str]]:
        """Images of the batch's first classes."""
        labels = np.asarray(batch["label"][:_PREVIEWS])
        labels = np.where(labels < 0, self.module.config.num_classes, labels)
        shape, key = np.shape(batch["mean"])[1:], jax.random.key(settings.seed)
        sampling = SamplingConfig(settings.steps, settings.guidance).with_defaults()
        latents = _sample(self, sampling.steps, sampling.guidance, shape, params, labels, key)
        images = gather_to_host(self.frozen.vae.decode(self.frozen.vae.config.unscaled(latents)))
        return list(to_uint8(check_images(images))), [f"class {n}" for n in labels]

    def component(self, params):
        """The DiT bound to parameters, as load_component gives one."""
        return component.DiT(self.module.config, params, self.module.dtype)

    def export(self, params, folder: Path, batches) -> None:
        """folder/transformer, the DiT, with the VAE and scheduler beside it; diffusers has no
        pipeline for them."""
        first = jax.process_index() == 0
        for part in ("transformer", "vae", "scheduler") if first else ():
            shutil.rmtree(folder / part, ignore_errors=True)
        self.component(params).save(folder / "transformer")
        self.frozen.copied("vae").save(folder / "vae")
        if first:
            self.denoising.scheduler.write(folder / "scheduler")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sample(
    task: ClassConditional, steps: int, guidance: float, shape: tuple[int, ...], params, labels, key
) -> jax.Array:
    """Latents [b, *shape] of labels [b]; one executable a stage and size."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(labels)))
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    doubled = jnp.concatenate([jnp.full_like(labels, task.module.config.num_classes), labels])

    def of(labels):
        return lambda x, t: task.module.apply({"params": params}, x, t, labels)

    return diffusion.sample(
        diffusion.classifier_free_guidance(of(doubled), guidance, conditional=of(labels)),
        noise,
        steps=steps,
        schedule=task.denoising.schedule,
        prediction=task.denoising.objective.prediction,
    )

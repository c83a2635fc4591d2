"""Task 'autoencoder': the VAE learns to reconstruct images, with a light pull of its posterior to
the unit Gaussian."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import AutoencoderConfig, Config, StageConfig
from pixart_jax.diffusion.objective import sample_mean
from pixart_jax.errors import UserError
from pixart_jax.finite import check_images
from pixart_jax.images import to_uint8
from pixart_jax.models.vae import AutoencoderKL
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.weights.component import VAE

_CALIBRATION = 32  # batches that the scaling factor is measured on


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Batches: {"images": fp32 [b, H, W, 3] in [-1, 1]}."""

    module: AutoencoderKL
    objective: AutoencoderConfig
    image_size: tuple[int, int]

    @classmethod
    def from_config(
        cls, config: Config, stage: StageConfig, dtype: jnp.dtype, frozen: object
    ) -> Autoencoder:
        """The VAE of config.vae_model; UserError without one."""
        if config.vae_model is None:
            raise UserError(
                f"stage {stage.name}: task autoencoder needs the config's vae_model, the sizes to "
                "train"
            )
        module = AutoencoderKL(config.vae_model, dtype=dtype)
        return cls(module, stage.autoencoder, stage.data.buckets[0])

    def init(self, key: jax.Array):
        """Fresh boxed parameters; also for jax.eval_shape."""
        return self.module.init(key, jnp.zeros((1, *self.image_size, 3)))["params"]

    def on_stage_start(self, params, base=None):
        """Return the parameters as they are: nothing to set before a stage."""
        return params

    def losses(self, params, batch, keys, base=None) -> dict[str, jax.Array]:
        """loss = l1 · L1 + l2 · L2 + kl · KL, each a mean over pixels or latent values; one value a
        sample, [b]."""
        images = batch["images"]
        mean, log_variance = self.module.apply({"params": params}, images, method="moments")
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        latents = mean + jnp.exp(0.5 * log_variance) * noise
        error = self.module.apply({"params": params}, latents, method="decode") - images
        l1, l2 = sample_mean(jnp.abs(error)), sample_mean(jnp.square(error))
        kl = 0.5 * sample_mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
        o = self.objective
        loss = o.l1_weight * l1 + o.l2_weight * l2 + o.kl_weight * kl
        return {"loss": loss, "l1": l1, "mse": l2, "kl": kl}

    def preview(self, params, batch, settings, base=None) -> tuple[list[np.ndarray], list[str]]:
        """Up to 8 pairs of image and reconstruction."""
        images = np.asarray(batch["images"][:8], np.float32)
        vae = VAE(self.module.config, params, self.module.dtype)
        decoded = check_images(gather_to_host(vae.decode(vae.encode(images)[0])))
        pairs = [to_uint8(image) for pair in zip(images, decoded, strict=True) for image in pair]
        return pairs, ["image", "reconstruction"] * len(images)

    def export(self, params, folder: Path, batches) -> None:
        """folder/vae, its scaling factor one over the deviation of the latents (arXiv 2112.10752,
        appendix G)."""

        @jax.jit
        def encode(params, images):
            return self.module.apply({"params": params}, images, method="encode")

        moments = []
        for step in range(_CALIBRATION):
            images = np.asarray(batches(step)["images"], np.float32)
            mean, std = encode(params, images)
            moments.append(float(jnp.mean(jnp.square(mean) + jnp.square(std))))
        scaling = round(1 / float(np.sqrt(np.mean(moments))), 5)
        config = dataclasses.replace(self.module.config, scaling_factor=scaling)
        VAE(config, params).save(folder / "vae")

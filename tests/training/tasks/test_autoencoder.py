"""The autoencoder's loss, beside its terms in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import AutoencoderConfig
from pixart_jax.models.configs import VAEConfig
from pixart_jax.models.vae import AutoencoderKL
from pixart_jax.training.tasks.autoencoder import Autoencoder
from tests.parameters import normal_params

VAE = AutoencoderKL(
    VAEConfig(
        block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, mid_block_attention=False
    )
)


def test_the_loss_is_l1_and_l2_and_kl_by_their_weights():
    task = Autoencoder(VAE, AutoencoderConfig(l1_weight=2.0, l2_weight=3.0, kl_weight=0.5), (8, 8))
    params = normal_params(task.init)
    images = jax.random.uniform(jax.random.key(1), (3, 8, 8, 3), minval=-1, maxval=1)
    keys = jax.random.split(jax.random.key(2), 3)
    found = jax.jit(task.losses)(params, {"images": images}, keys)

    @jax.jit
    def reference(params):
        mean, log_variance = VAE.apply({"params": params}, images, method="moments")
        noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
        latents = mean + jnp.exp(log_variance / 2) * noise
        return mean, log_variance, VAE.apply({"params": params}, latents, method="decode")

    mean, log_variance, decoded = reference(params)
    error = np.asarray(decoded, np.float64) - np.asarray(images)
    m, v = np.asarray(mean, np.float64), np.exp(np.asarray(log_variance, np.float64))
    expected = (
        2 * np.abs(error).mean((1, 2, 3))
        + 3 * np.square(error).mean((1, 2, 3))
        + 0.5 * (0.5 * (m**2 + v - 1 - np.log(v))).mean((1, 2, 3))
    )
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)

"""Latents → pixels, part by part, so that the decoder's activations fit."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixart_jax.parallel.rules import row_sharding
from pixart_jax.pipeline import binning

# decoded at once on a device: the decoder's activations are far larger than its image
_PIXELS = 2 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """module: the VAE's. scaling_factor: of its latents. factor: pixels a latent. size: (height,
    width) in pixels that images are fitted to, or None. mesh: where each device decodes its own
    images, so many rows at least as ``rows``; None on one device."""

    module: nn.Module
    scaling_factor: float
    factor: int
    size: tuple[int, int] | None = None
    mesh: jax.sharding.Mesh | None = None
    rows: int = 1


def decode_latents(how: DecodeSpec, params, latents: jax.Array) -> jax.Array:
    """Latents [b, h, w, c] as the transformer knows them → images uint8 [b, height, width, 3]; to
    be traced in a jit."""
    batch, rows, columns, _ = latents.shape
    decode = functools.partial(how.module.apply, {"params": params}, method="decode")
    latents = latents / how.scaling_factor
    if how.mesh is not None:
        fill = how.rows - batch  # guidance may have had fewer rows whole on all devices
        latents = jnp.concatenate([latents, *[latents[-1:]] * fill]) if fill > 0 else latents
        latents = jax.lax.with_sharding_constraint(latents, row_sharding(how.mesh, len(latents)))
        return to_uint8(decode(latents), how.size)[:batch]
    most = max(1, _PIXELS // (rows * columns * how.factor**2))
    part = max(n for n in range(1, batch + 1) if batch % n == 0 and (n <= most or n == 1))
    if part == batch:
        return to_uint8(decode(latents), how.size)
    images = jax.lax.map(
        lambda part: to_uint8(decode(part), how.size),
        latents.reshape(batch // part, part, *latents.shape[1:]),
    )
    return images.reshape(batch, *images.shape[2:])


decoded = jax.jit(decode_latents, static_argnums=0)


def to_uint8(images: jax.Array, size: tuple[int, int] | None) -> jax.Array:
    """About [-1, 1] → uint8, resized and cut to size (height, width) where one is given."""
    images = images if size is None else binning.resize_and_crop(images, *size)
    return jnp.round((images / 2 + 0.5).clip(0, 1) * 255).astype(jnp.uint8)

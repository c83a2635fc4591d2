"""Latents ↔ images: the VAE part by part, so that its activations fit, and the fit to a size."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixart_jax import finite
from pixart_jax.images import to_model
from pixart_jax.models.configs import VAEConfig
from pixart_jax.parallel.rules import row_sharding

# decoded at once on a device: the decoder's activations are far larger than its image
_PIXELS = 2 * 1024 * 1024
WRAP = 16  # latents around a seamless texture: as far as the decoder sees


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """module: the VAE's. mesh: where each device takes its own images, at least ``rows`` in all;
    None: one device. wrap: of a seamless texture, the latents on each side that repeat the opposite
    one."""

    module: nn.Module
    mesh: jax.sharding.Mesh | None = None
    rows: int = 1
    wrap: int = 0

    @property
    def config(self) -> VAEConfig:
        return self.module.config  # type: ignore[attr-defined]


def decode_latents(spec: DecodeSpec, params, latents: jax.Array) -> jax.Array:
    """The transformer's latents [b, h, w, c] → images [b, height, width, 3] of about [−1, 1]."""
    decode = functools.partial(spec.module.apply, {"params": params}, method="decode")
    decode = wrapped(decode, spec.wrap, spec.wrap * spec.config.factor)
    sides = ((side + 2 * spec.wrap) * spec.config.factor for side in latents.shape[1:3])
    return _by_parts(spec, decode, spec.config.unscaled(latents), math.prod(sides))


def wrapped(function, before: int, after: int):
    """function of arrays [b, h, w, c] with ``before`` cells of the opposite side around them, whose
    result is cut by ``after`` cells on each side."""
    if not before:
        return function

    def padded(array):
        sides = ((0, 0), (before, before), (before, before), (0, 0))
        found = function(jnp.pad(array, sides, mode="wrap"))
        return jax.tree.map(lambda a: a[:, after:-after, after:-after], found)

    return padded


@functools.partial(jax.jit, static_argnums=0)
def encode_jit(spec: DecodeSpec, params, images: jax.Array) -> jax.Array:
    """Images uint8 [b, height, width, 3] → the transformer's latents [b, h, w, c] fp32: the mean of
    the VAE's posterior, so that they depend on no random number."""

    def encode(images):
        mean, _ = spec.module.apply({"params": params}, to_model(images), method="encode")
        return spec.config.scaled(mean.astype(jnp.float32))

    encode = wrapped(encode, spec.wrap * spec.config.factor, spec.wrap)
    return _by_parts(spec, encode, images, images.shape[1] * images.shape[2])


def _by_parts(spec: DecodeSpec, function, array: jax.Array, pixels: int) -> jax.Array:
    """function(array [b, …]) of so many images at once as fit; pixels: of an image."""
    batch = len(array)
    if spec.mesh is not None:
        fill = spec.rows - batch  # guidance may have had fewer rows whole on all devices
        array = jnp.concatenate([array, *[array[-1:]] * fill]) if fill > 0 else array
        array = jax.lax.with_sharding_constraint(array, row_sharding(spec.mesh, len(array)))
        return function(array)[:batch]
    limit = max(1, _PIXELS // pixels)
    part = max(n for n in range(1, batch + 1) if batch % n == 0 and (n <= limit or n == 1))
    if part == batch:
        return function(array)
    parts = jax.lax.map(function, array.reshape(batch // part, part, *array.shape[1:]))
    return parts.reshape(batch, *parts.shape[2:])


@functools.partial(jax.jit, static_argnums=0)
def decode_jit(spec: DecodeSpec, params, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(images, bool [b]: whether an image is finite)."""
    images = decode_latents(spec, params, latents)
    return images, finite.rows(images)


@functools.partial(jax.jit, static_argnums=1)
def fit(images: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    """Images [b, H, W, 3] of about [−1, 1] → uint8 [b, height, width, 3], resized and cropped to
    ``size``. A small program of its own: another size recompiles nothing else."""
    images = images if size is None else resize_and_crop(images, *size)
    return jnp.round((images / 2 + 0.5).clip(0, 1) * 255).astype(jnp.uint8)


@jax.jit
def paste(images: jax.Array, known: jax.Array, weight: jax.Array) -> jax.Array:
    """Images [b, h, w, 3] of about [−1, 1] where weight [b, h, w] is 1, known uint8 [b, h, w, 3]
    where it is 0, to the bit; a blend between."""
    weight, known = weight[..., None], to_model(known)
    return jnp.where(weight > 0, weight * images + (1 - weight) * known, known)


def resize_and_crop(images: jax.Array, height: int, width: int) -> jax.Array:
    """Images [b, H, W, 3] → [b, height, width, 3]: resized to cover that size, keeping their aspect
    ratio, then cropped around the center. Bilinear without antialiasing, as in diffusers."""
    batch, rows, columns, channels = images.shape
    if (rows, columns) == (height, width):
        return images
    ratio = max(height / rows, width / columns)
    rows, columns = max(height, int(rows * ratio)), max(width, int(columns * ratio))
    images = jax.image.resize(images, (batch, rows, columns, channels), "bilinear", antialias=False)
    top, left = (rows - height) // 2, (columns - width) // 2
    return images[:, top : top + height, left : left + width]

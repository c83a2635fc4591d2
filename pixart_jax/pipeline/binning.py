"""Resolution binning: a size that a model never saw is drawn at the nearest one that it knows, then
fitted to what was asked for."""

from __future__ import annotations

import jax

from pixart_jax.data import buckets
from pixart_jax.models.transformer import TransformerConfig
from pixart_jax.models.vae import VAEConfig


def base(transformer: TransformerConfig, vae: VAEConfig) -> int | None:
    """The side of the square bucket of the model's table, in pixels; None where its size has no
    table (a small model's)."""
    side = transformer.sample_size * vae.factor
    return side if side in buckets.INFERENCE_TABLES else None


def generation_size(
    transformer: TransformerConfig, vae: VAEConfig, height: int, width: int
) -> tuple[int, int]:
    """(height, width) that an image of this size is drawn at: the bucket of the nearest aspect
    ratio, or itself without a table."""
    side = base(transformer, vae)
    return (height, width) if side is None else buckets.nearest(height, width, side, inference=True)


def resize_and_crop(images: jax.Array, height: int, width: int) -> jax.Array:
    """Images [b, H, W, 3] → [b, height, width, 3]: resized, keeping their ratio, until they cover
    it, then cut around the middle.

    Bilinear without antialiasing, as diffusers does it.
    """
    batch, rows, columns, channels = images.shape
    if (rows, columns) == (height, width):
        return images
    ratio = max(height / rows, width / columns)
    rows, columns = max(height, int(rows * ratio)), max(width, int(columns * ratio))
    images = jax.image.resize(images, (batch, rows, columns, channels), "bilinear", antialias=False)
    top, left = (rows - height) // 2, (columns - width) // 2
    return images[:, top : top + height, left : left + width]

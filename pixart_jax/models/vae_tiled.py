"""Decoding a large image in overlapping tiles of one shape, blended, so that memory depends on the
tile alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """First cells of the tiles along a side: as few as overlap by at least ``overlap``, spread
    evenly, the last one at the end."""
    if side <= tile:
        return [0]
    count = math.ceil((side - overlap) / (tile - overlap))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int, first: bool, last: bool) -> np.ndarray:
    """Weights of a tile along one axis, [length] fp32: linear over the overlap on each side that
    another tile continues."""
    weights = np.ones(length, np.float32)
    slope = (np.arange(overlap, dtype=np.float32) + 0.5) / max(overlap, 1)
    if not first:
        weights[:overlap] = slope
    if not last:
        weights[length - overlap :] = np.minimum(weights[length - overlap :], slope[::-1])
    return weights


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _blend(total, weight, tile, tile_weight, top, left):
    """Add one tile [b, t, t', c] with its weights [t, t', 1] to the running sums; the place is
    traced, so one program does for all."""
    b, height, width, channels = tile.shape
    region = jax.lax.dynamic_slice(total, (0, top, left, 0), (b, height, width, channels))
    total = jax.lax.dynamic_update_slice(total, region + tile * tile_weight, (0, top, left, 0))
    region = jax.lax.dynamic_slice(weight, (top, left, 0), (height, width, 1))
    return total, jax.lax.dynamic_update_slice(weight, region + tile_weight, (top, left, 0))


def tiled_decode(
    decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int = 64, overlap: int = 16
) -> jax.Array:
    """decode(latents), tile by tile: latents [b, h, w, 4] → images [b, h · f, w · f, 3].

    tile, overlap: in latent cells. Tiles are cross-faded linearly over the overlap. Group norms and
    the middle attention see a tile rather than the image, so the result is near that of one pass
    and not equal to it. Latents no larger than a tile are decoded in one pass. Raises UserError
    when the overlap leaves nothing of a tile, or more than half of it on each side.
    """
    if tile < 1 or not 0 <= overlap <= tile // 2:
        raise UserError(
            f"tile {tile} with overlap {overlap}: a tile is at least 1 and the overlap lies in 0 "
            f"… {max(tile, 0) // 2}, half the tile"
        )
    b, height, width, _ = latents.shape
    if height <= tile and width <= tile:
        return decode(latents)
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    total = weight = None
    for top in rows:
        for left in columns:
            image = decode(latents[:, top : top + tile, left : left + tile])
            if total is None:
                factor = image.shape[1] // min(tile, height)
                total = jnp.zeros(
                    (b, height * factor, width * factor, image.shape[-1]), jnp.float32
                )
                weight = jnp.zeros((height * factor, width * factor, 1), jnp.float32)
            down = _ramp(image.shape[1], overlap * factor, top == rows[0], top == rows[-1])
            across = _ramp(
                image.shape[2], overlap * factor, left == columns[0], left == columns[-1]
            )
            total, weight = _blend(
                total,
                weight,
                image,
                (down[:, None] * across[None])[..., None],
                top * factor,
                left * factor,
            )
    return total / weight

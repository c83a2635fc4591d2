"""Key and value compression (PixArt-Σ): some layers' self-attention reads the keys and values of a
coarser grid of image tokens.

Every R × R patches give one key and one value, by a depthwise convolution of kernel and stride R
that starts as their mean, and a LayerNorm; keys and values share both. Queries keep the whole grid,
so a layer's attention costs 1/R² of what it did.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.parallel.axes import LAYERS, NORM

_EPS = 1e-5


class Compression(NamedTuple):
    """What one layer's attention needs of it; with a leading axis [depth, …], what every layer's
    does."""

    here: jax.Array  # bool: whether this layer compresses; the rest is not read where it does not
    kernel: jax.Array  # [R, R, 1, d]
    bias: jax.Array  # [d]
    norm_scale: jax.Array  # [d]
    norm_bias: jax.Array  # [d]


class KVCompression(nn.Module):
    """The parameters, fp32 and stacked over the compressed layers alone; called, it gives every
    layer its own."""

    ratio: int  # R
    layers: tuple[int, ...]
    depth: int
    width: int

    @nn.compact
    def __call__(self) -> Compression:
        count, r, d = len(self.layers), self.ratio, self.width
        ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()

        def param(name, init, *shape):
            axes = (LAYERS, *[None] * (len(shape) - 1), NORM)
            return self.param(
                name, nn.with_logical_partitioning(init, axes), (count, *shape), jnp.float32
            )

        stacked = (
            param("kernel", nn.initializers.constant(1 / r**2), r, r, 1, d),
            param("bias", zeros, d),
            param("norm_scale", ones, d),
            param("norm_bias", zeros, d),
        )
        here, row = np.zeros(self.depth, bool), np.zeros(self.depth, int)
        here[list(self.layers)], row[list(self.layers)] = True, np.arange(count)
        return Compression(jnp.asarray(here), *(leaf[row] for leaf in stacked))


def compress(tokens: jax.Array, grid: tuple[int, int], by: Compression) -> jax.Array:
    """Keys or values [b, rows · columns, d] → [b, rows // R · columns // R, d], in their dtype;
    computed in fp32.

    Rows and columns beyond the last whole R × R are left out, as a convolution without padding
    leaves them.
    """
    b, _, d = tokens.shape
    r = by.kernel.shape[0]
    rows, columns = (side // r for side in grid)
    x = tokens.reshape(b, *grid, d)[:, : rows * r, : columns * r].astype(jnp.float32)
    x = x.reshape(b, rows, r, columns, r, d) * by.kernel.reshape(r, 1, r, d)
    x = (x.sum((2, 4)) + by.bias).reshape(b, rows * columns, d)
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + _EPS)
    return (normed * by.norm_scale + by.norm_bias).astype(tokens.dtype)

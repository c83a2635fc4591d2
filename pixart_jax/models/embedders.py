"""Embedders of patches, positions, scalars (timesteps, image sizes) and labels, and the inverse of
the patch embedding."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.models.configs import BackboneConfig
from pixart_jax.models.layers import Dense, adapted, param, xavier, zeros
from pixart_jax.parallel.axes import ACT_EMBED, BATCH, CONV_IN, EMBED, MLP, NORM, VOCAB

SINUSOID_CHANNELS = 256
normal = nn.initializers.normal(0.02)


def sinusoid(values: jax.Array) -> jax.Array:
    """Scalars [..] → [.., 256] fp32: cosines, then sines, of value · 10000^(−i/128).

    fp32 in every model: bf16 has 8 bits of mantissa and does not distinguish timestep 257 from 258.
    """
    half = SINUSOID_CHANNELS // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half, dtype=np.float64) / half).astype(
        np.float32
    )
    angles = jnp.asarray(values, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedder(nn.Module):
    """Scalars [b] → [b, width] fp32: sinusoid, Linear, SiLU, Linear. For timesteps, image sizes and
    aspect ratios.

    Always fp32 at full precision: these are b vectors beside the blocks' b·n, and they scale
    everything in the model.
    """

    width: int

    def setup(self):
        high = jax.lax.Precision.HIGHEST
        self.fc1 = Dense(self.width, (None, EMBED), normal, precision=high)
        self.fc2 = Dense(self.width, (EMBED, MLP), normal, precision=high)

    def __call__(self, values: jax.Array) -> jax.Array:
        return _replicate_width(self.fc2(nn.silu(_replicate_width(self.fc1(sinusoid(values))))))


def sincos_1d(count: int, dim: int, base: float, scale: float) -> np.ndarray:
    """[count, dim] fp32: all sines, then all cosines, of coordinate · 10000^(−j / (dim/2)).

    Coordinate i of ``count`` along an axis is i · base / count / scale: any grid spans
    [0, base / scale), so a model trained at one resolution and aspect ratio reads another.
    """
    coordinates = np.arange(count, dtype=np.float64) * base / count / scale
    frequencies = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2))
    angles = coordinates[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_2d(
    height: int, width: int, dim: int, base_size: float, scale: float = 1.0
) -> np.ndarray:
    """[height·width, dim] fp32, rows first: the positions of a grid of height × width patches. The
    first half of the channels encodes x (the column), the second half y (the row)."""
    x = sincos_1d(width, dim // 2, base_size, scale)
    y = sincos_1d(height, dim // 2, base_size, scale)
    x = np.broadcast_to(x[None], (height, width, dim // 2))
    y = np.broadcast_to(y[:, None], (height, width, dim // 2))
    return np.concatenate([x, y], axis=-1).reshape(height * width, dim)


class PatchEmbedder(nn.Module):
    """Latents [b, h, w, c] → tokens [b, n, d] with their positions added; n = h/p · w/p, rows
    first."""

    config: BackboneConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        c, d = self.config, self.config.width
        rows, columns = c.grid(latents.shape)
        p, fan_in = c.patch_size, c.patch_size**2 * c.in_channels
        # A convolution of stride p as one product; the kernel has the convolution's shape.
        axes = (None, None, CONV_IN, EMBED)
        kernel = param(self, "kernel", xavier(fan_in, d), (p, p, c.in_channels, d), axes)
        bias = param(self, "bias", zeros, (d,), (NORM,))
        patches = latents.reshape(-1, rows, p, columns, p, c.in_channels).transpose(
            0, 1, 3, 2, 4, 5
        )
        patches = patches.reshape(-1, rows, columns, fan_in).astype(self.dtype)
        kernel = kernel.reshape(fan_in, d).astype(self.dtype)
        tokens = adapted(self, patches, kernel, jnp.dot(patches, kernel))
        # Two one-dimensional tables, broadcast: the full one would be megabytes of constants in the
        # program.
        x = jnp.asarray(sincos_1d(columns, d // 2, c.base, c.position_scale))[None, None, :, :]
        y = jnp.asarray(sincos_1d(rows, d // 2, c.base, c.position_scale))[None, :, None, :]
        tokens = tokens.astype(jnp.float32) + bias
        tokens = jnp.concatenate([tokens[..., : d // 2] + x, tokens[..., d // 2 :] + y], axis=-1)
        return tokens.reshape(-1, rows * columns, d).astype(self.dtype)


class LabelEmbedder(nn.Module):
    """Labels [b] int in 0 … classes → [b, d] fp32; the last row stands for "no class"."""

    classes: int
    width: int

    @nn.compact
    def __call__(self, labels: jax.Array) -> jax.Array:
        table = param(self, "table", normal, (self.classes + 1, self.width), (VOCAB, EMBED))
        return _replicate_width(jnp.take(table, labels, axis=0).astype(jnp.float32))


def _replicate_width(vectors: jax.Array) -> jax.Array:
    """Vectors [b, .., d], whole along d: a kernel split along d would otherwise gather the batch's
    vectors."""
    return nn.with_logical_constraint(vectors, (BATCH, *[None] * (vectors.ndim - 2), ACT_EMBED))


def unpatchify(tokens: jax.Array, rows: int, columns: int, patch: int) -> jax.Array:
    """Tokens [b, rows·columns, p·p·c] → [b, rows·p, columns·p, c]."""
    x = tokens.reshape(-1, rows, columns, patch, patch, tokens.shape[-1] // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * patch, columns * patch, x.shape[-1])

"""How latents, timesteps, image sizes and labels become tokens and vectors of the model's width,
and tokens latents again."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.models.geometry import BackboneConfig
from pixart_jax.models.layers import Dense, xavier
from pixart_jax.models.positions import sincos_1d
from pixart_jax.parallel.axes import ACT_EMBED, BATCH, CONV_IN, EMBED, MLP, NORM, VOCAB

_SINUSOID = 256  # channels of every sinusoid of a scalar
normal = nn.initializers.normal(0.02)


def sinusoid(values: jax.Array) -> jax.Array:
    """Scalars [..] → [.., 256] fp32: cosines, then sines, of value · 10000^(−i/128).

    fp32 whatever the model computes in: bf16 has 8 bits of mantissa and cannot tell timestep 257
    from 258.
    """
    half = _SINUSOID // 2
    frequencies = np.exp(-np.log(10000.0) * np.arange(half, dtype=np.float64) / half).astype(
        np.float32
    )
    angles = jnp.asarray(values, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedder(nn.Module):
    """Scalars [b] → [b, width] fp32: sinusoid, Linear, SiLU, Linear. For timesteps, image sizes and
    aspect ratios.

    Always fp32 at full precision: it is b vectors beside the blocks' b·n, and everything in the
    model is scaled by them.
    """

    width: int

    def setup(self):
        high = jax.lax.Precision.HIGHEST
        self.fc1 = Dense(self.width, (None, EMBED), normal, precision=high)
        self.fc2 = Dense(self.width, (EMBED, MLP), normal, precision=high)

    def __call__(self, values: jax.Array) -> jax.Array:
        return _held(self.fc2(nn.silu(_held(self.fc1(sinusoid(values))))))


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
        # A convolution of stride p as one matrix product: the kernel is kept in the convolution's
        # shape, as released files have it.
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(xavier(fan_in, d), (None, None, CONV_IN, EMBED)),
            (p, p, c.in_channels, d),
            jnp.float32,
        )
        bias = self.param(
            "bias",
            nn.with_logical_partitioning(nn.initializers.zeros_init(), (NORM,)),
            (d,),
            jnp.float32,
        )
        patches = latents.reshape(-1, rows, p, columns, p, c.in_channels).transpose(
            0, 1, 3, 2, 4, 5
        )
        tokens = jnp.dot(
            patches.reshape(-1, rows, columns, fan_in).astype(self.dtype),
            kernel.reshape(fan_in, d).astype(self.dtype),
        )
        # The two one-dimensional tables are added by broadcasting: the whole one would be megabytes
        # of constant in the program.
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
        table = self.param(
            "table",
            nn.with_logical_partitioning(normal, (VOCAB, EMBED)),
            (self.classes + 1, self.width),
            jnp.float32,
        )
        return _held(jnp.take(table, labels, axis=0).astype(jnp.float32))


def _held(vectors: jax.Array) -> jax.Array:
    """Vectors [b, .., d] each whole with their sample: a kernel cut along d would otherwise have
    the batch's vectors gathered."""
    return nn.with_logical_constraint(vectors, (BATCH, *[None] * (vectors.ndim - 2), ACT_EMBED))


def unpatchify(tokens: jax.Array, rows: int, columns: int, patch: int) -> jax.Array:
    """Tokens [b, rows·columns, p·p·c] → [b, rows·p, columns·p, c]."""
    x = tokens.reshape(-1, rows, columns, patch, patch, tokens.shape[-1] // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * patch, columns * patch, x.shape[-1])

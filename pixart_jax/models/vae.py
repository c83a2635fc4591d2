"""AutoencoderKL: the convolutional autoencoder of Stable Diffusion (arXiv 2112.10752).

Images [b, H, W, 3] in [-1, 1] ↔ latents [b, H/f, W/f, 4], f = 2^(levels − 1). The encoder gives a
diagonal Gaussian. Latents are unscaled here: callers multiply by ``config.scaling_factor`` before
denoising. No layer is in ``lax.scan``: levels differ in shape, and a scanned convolution is slow on
a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.models.attention import attention
from pixart_jax.models.configs import VAEConfig
from pixart_jax.models.layers import ones, param, zeros
from pixart_jax.parallel.axes import BATCH, CONV_IN, CONV_OUT, NORM

lecun = nn.initializers.lecun_normal()
_IMAGES = (BATCH, None, None, None)  # logical names of [b, h, w, c]
_GROUP_NORM_EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Convolution(nn.Module):
    """3×3 convolution, [b, h, w, c] → [b, h', w', features]. stride 2 pads below and to the right
    only, as SD's encoder does."""

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features,
            (3, 3),
            strides=self.stride,
            padding="SAME" if self.stride == 1 else ((0, 1), (0, 1)),
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(lecun, (None, None, CONV_IN, CONV_OUT)),
            bias_init=nn.with_logical_partitioning(zeros, (CONV_OUT,)),
            name="conv",
        )(x)
        # otherwise an fsdp mesh may gather images instead of kernels
        return nn.with_logical_constraint(x, _IMAGES)


def _dense(features: int, dtype: jnp.dtype, name: str | None = None) -> nn.Dense:
    """A 1×1 convolution, [..., c] → [..., features]."""
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(lecun, (CONV_IN, CONV_OUT)),
        bias_init=nn.with_logical_partitioning(zeros, (CONV_OUT,)),
        name=name,
    )


class GroupNorm(nn.Module):
    """Group normalisation with statistics in fp32, [b, ..., c] → the same.

    The groups are folded into a scale and a shift [b, c], so the pass over the image is one
    multiply-add, which XLA fuses with the activation after it.
    """

    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = param(self, "scale", ones, (channels,), (NORM,))
        bias = param(self, "bias", zeros, (channels,), (NORM,))
        per_group = (x.shape[0], self.groups, channels // self.groups)
        space = tuple(range(1, x.ndim - 1))
        spread = (slice(None), *(None,) * len(space))  # [b, c] → [b, 1, 1, c]
        wide = x.astype(jnp.float32)

        def over_group(per_channel):  # [b, c] → the mean of each channel's group
            mean = per_channel.reshape(per_group).mean(-1, keepdims=True)
            return jnp.broadcast_to(mean, per_group).reshape(x.shape[0], channels)

        mean = over_group(wide.mean(space))
        variance = over_group(jnp.square(wide - mean[spread]).mean(space))
        factor = jax.lax.rsqrt(variance + _GROUP_NORM_EPSILON) * scale
        return (wide * factor[spread] + (bias - mean * factor)[spread]).astype(self.dtype)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1×1 shortcut where the width changes."""

    features: int
    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm1")(x))
        y = Convolution(self.features, dtype=self.dtype, name="conv1")(y)
        y = nn.silu(GroupNorm(self.groups, self.dtype, name="norm2")(y))
        y = Convolution(self.features, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = nn.with_logical_constraint(
                _dense(self.features, self.dtype, "shortcut")(x), _IMAGES
            )
        return nn.with_logical_constraint(x + y, _IMAGES)


class SpatialAttention(nn.Module):
    """Single-head self-attention over all cells of [b, h, w, c], with its residual."""

    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        y = GroupNorm(self.groups, self.dtype, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (
            # [b, h·w, 1, c]
            nn.with_logical_constraint(_dense(c, self.dtype, name)(y)[:, :, None], _IMAGES)
            for name in ("query", "key", "value")
        )
        y = attention(q, k, v)[:, :, 0]
        return x + _dense(c, self.dtype, "out")(y).reshape(b, h, w, c)


class MiddleBlock(nn.Module):
    """Residual block, attention (optional), residual block, at the lowest resolution."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features, groups = self.config.block_out_channels[-1], self.config.norm_num_groups
        x = ResidualBlock(features, groups, self.dtype, name="resnet_0")(x)
        if self.config.mid_block_attention:
            x = SpatialAttention(groups, self.dtype, name="attention")(x)
        return ResidualBlock(features, groups, self.dtype, name="resnet_1")(x)


class Encoder(nn.Module):
    """Images [b, H, W, 3] → moments [b, H/f, W/f, 2 · latent_channels]: mean, then log-variance."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_num_groups
        x = Convolution(config.block_out_channels[0], dtype=self.dtype, name="conv_in")(x)
        for level, features in enumerate(config.block_out_channels):
            for i in range(config.layers_per_block):
                x = ResidualBlock(features, groups, self.dtype, name=f"down_{level}_resnet_{i}")(x)
            if level < len(config.block_out_channels) - 1:
                x = Convolution(
                    features, stride=2, dtype=self.dtype, name=f"down_{level}_downsample"
                )(x)
        x = MiddleBlock(config, self.dtype, name="mid")(x)
        x = nn.silu(GroupNorm(groups, self.dtype, name="norm_out")(x))
        return Convolution(2 * config.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents [b, h, w, latent_channels] → images [b, h · f, w · f, 3]; level 0 is the lowest
    resolution."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, groups = self.config, self.config.norm_num_groups
        x = Convolution(config.block_out_channels[-1], dtype=self.dtype, name="conv_in")(x)
        x = MiddleBlock(config, self.dtype, name="mid")(x)
        for level, features in enumerate(reversed(config.block_out_channels)):
            for i in range(config.layers_per_block + 1):
                x = ResidualBlock(features, groups, self.dtype, name=f"up_{level}_resnet_{i}")(x)
            if level < len(config.block_out_channels) - 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = Convolution(features, dtype=self.dtype, name=f"up_{level}_upsample")(x)
        x = nn.silu(GroupNorm(groups, self.dtype, name="norm_out")(x))
        return Convolution(config.in_channels, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """The autoencoder; ``__call__`` is for init and training, ``encode`` and ``decode`` for use.
    Parameters and outputs are fp32, the computation is in dtype."""

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        if self.config.use_quant_conv:
            self.quant = _dense(2 * self.config.latent_channels, self.dtype)
            self.post_quant = _dense(self.config.latent_channels, self.dtype)

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [b, H, W, 3] in [-1, 1] → (mean, log-variance) [b, H/f, W/f, latent_channels]
        fp32, for a KL loss.

        Sides that are not a multiple of f lose the remainder, as in the reference.
        """
        if images.ndim != 4 or images.shape[-1] != self.config.in_channels:
            raise UserError(
                f"images of shape {tuple(images.shape)} do not fit: [batch, height, width, "
                f"{self.config.in_channels}] would"
            )
        if min(images.shape[1:3]) < self.config.factor:
            raise UserError(
                f"images of {images.shape[1]}×{images.shape[2]} are too small: a side is at least "
                f"{self.config.factor} pixels"
            )
        x = self.encoder(images.astype(self.dtype))
        if self.config.use_quant_conv:
            x = self.quant(x)
        mean, log_variance = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [b, H, W, 3] in [-1, 1] → (mean, std) of the posterior, [b, H/f, W/f,
        latent_channels] fp32 each."""
        mean, log_variance = self.moments(images)
        return mean, jnp.exp(0.5 * log_variance)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [b, h, w, latent_channels], unscaled → images [b, h · f, w · f, 3] fp32 in about
        [-1, 1], not clipped."""
        if latents.ndim != 4 or latents.shape[-1] != self.config.latent_channels:
            raise UserError(
                f"latents of shape {tuple(latents.shape)} do not fit: [batch, height, width, "
                f"{self.config.latent_channels}] would"
            )
        x = latents.astype(self.dtype)
        if self.config.use_quant_conv:
            x = self.post_quant(x)
        return self.decoder(x).astype(jnp.float32)

    def __call__(
        self, images: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images → (reconstruction, mean, log-variance). The decoder gets a sample of the
        posterior with a key, otherwise its mean."""
        mean, log_variance = self.moments(images)
        latents = mean
        if key is not None:
            latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return self.decode(latents), mean, log_variance


# ---- tiled decoding ----


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """First cells of the fewest tiles along a side that overlap by at least ``overlap``, evenly
    spaced, the last one at the end."""
    if side <= tile:
        return [0]
    count = math.ceil((side - overlap) / (tile - overlap))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def _ramp(length: int, overlap: int, first: bool, last: bool) -> np.ndarray:
    """Weights of a tile along one axis, [length] fp32, linear over the overlaps."""
    weights = np.ones(length, np.float32)
    slope = (np.arange(overlap, dtype=np.float32) + 0.5) / max(overlap, 1)
    if not first:
        weights[:overlap] = slope
    if not last:
        weights[length - overlap :] = np.minimum(weights[length - overlap :], slope[::-1])
    return weights


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _blend(total, weight, tile, tile_weight, top, left):
    """Add a tile [b, t, t', c] with its weights [t, t', 1] to the sums. Its place is traced:
    one program for all tiles."""
    b, height, width, channels = tile.shape
    region = jax.lax.dynamic_slice(total, (0, top, left, 0), (b, height, width, channels))
    total = jax.lax.dynamic_update_slice(total, region + tile * tile_weight, (0, top, left, 0))
    region = jax.lax.dynamic_slice(weight, (top, left, 0), (height, width, 1))
    return total, jax.lax.dynamic_update_slice(weight, region + tile_weight, (top, left, 0))


def tiled_decode(
    decode: Callable[[jax.Array], jax.Array], latents: jax.Array, tile: int = 64, overlap: int = 16
) -> jax.Array:
    """decode(latents) in overlapping tiles, so that memory depends on the tile only: latents [b, h,
    w, 4] → images [b, h · f, w · f, 3].

    tile, overlap: in latent cells. Tiles are cross-faded linearly over the overlap. Group norms and
    the middle attention see one tile, so the result is close to that of one pass, not equal.
    Latents no larger than a tile are decoded in one pass. UserError where the overlap is more than
    half a tile.
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
    total: Any = None
    weight: Any = None
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
            ends = left == columns[0], left == columns[-1]
            across = _ramp(image.shape[2], overlap * factor, *ends)
            weights = (down[:, None] * across[None])[..., None]
            total, weight = _blend(total, weight, image, weights, top * factor, left * factor)
    return total / weight

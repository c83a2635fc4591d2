"""AutoencoderKL: the convolutional autoencoder of Stable Diffusion (Rombach et al. 2022, arXiv
2112.10752) that PixArt works behind.

Images [b, H, W, 3] in [-1, 1] ↔ latents [b, H/f, W/f, 4], f = 2^(levels − 1). The encoder gives a
diagonal Gaussian; the
latents here are unscaled: ``config.scaling_factor`` is applied by whoever hands them to a denoiser.

Every layer stands outside of ``lax.scan``: the levels differ in shape, and a scanned convolution is
slow on a CPU.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError
from pixart_jax.models.attention import attention
from pixart_jax.parallel.axes import BATCH, CONV_IN, CONV_OUT, NORM

_IMAGES = (BATCH, None, None, None)  # logical names of [b, h, w, c]
_GROUP_NORM_EPSILON = 1e-6
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of an autoencoder; the defaults are Stable Diffusion's (83.7M parameters).

    block_out_channels: one width a level, the image halved between two levels. use_quant_conv: a
    1×1 convolution behind the encoder and one before the decoder. mid_block_attention: one
    single-head attention at the lowest resolution of each half. sample_size: side in pixels that it
    was trained at; a note only.
    """

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    mid_block_attention: bool = True
    sample_size: int = 256

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        for name in (
            "in_channels",
            "latent_channels",
            "layers_per_block",
            "norm_num_groups",
            "sample_size",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"VAEConfig.{name} = {getattr(self, name)!r}: must be at least 1")
        if not self.block_out_channels:
            raise UserError("VAEConfig.block_out_channels is empty: name one width a level")
        for width in self.block_out_channels:
            if width < 1 or width % self.norm_num_groups:
                raise UserError(
                    f"VAEConfig.block_out_channels = {self.block_out_channels!r}: "
                    f"{width} is not divisible by norm_num_groups = {self.norm_num_groups}"
                )
        if not self.scaling_factor > 0:
            raise UserError(f"VAEConfig.scaling_factor = {self.scaling_factor!r}: must be positive")

    @property
    def factor(self) -> int:
        """Pixels a latent cell spans in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


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
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(), (None, None, CONV_IN, CONV_OUT)
            ),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), (CONV_OUT,)),
            name="conv",
        )(x)
        # else an fsdp mesh may gather images rather than kernels
        return nn.with_logical_constraint(x, _IMAGES)


def _dense(features: int, dtype: jnp.dtype, name: str) -> nn.Dense:
    """A 1×1 convolution, [..., c] → [..., features]."""
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(
            nn.initializers.lecun_normal(), (CONV_IN, CONV_OUT)
        ),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), (CONV_OUT,)),
        name=name,
    )


class GroupNorm(nn.Module):
    """Group normalisation with statistics in fp32, [b, ..., c] → the same.

    The groups are folded into one scale and one shift a channel, [b, c] each, so that what is left
    of the pass over the image is one multiply-add, which XLA fuses with the activation behind it.
    """

    groups: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param(
            "scale", nn.with_logical_partitioning(nn.initializers.ones_init(), (NORM,)), (channels,)
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(nn.initializers.zeros_init(), (NORM,)), (channels,)
        )
        per_group = (x.shape[0], self.groups, channels // self.groups)
        space = tuple(range(1, x.ndim - 1))
        spread = (slice(None), *(None,) * len(space))  # [b, c] → [b, 1, 1, c]
        wide = x.astype(jnp.float32)

        # [b, c] → mean over each group's channels, given back to each channel
        def over_group(per_channel):
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
    """The autoencoder. ``init`` and training go through ``__call__``; use goes through ``encode``
    and ``decode``.

    dtype: of the computation; parameters and what comes out are fp32.
    """

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        if self.config.use_quant_conv:
            self.quant = _dense(2 * self.config.latent_channels, self.dtype, None)
            self.post_quant = _dense(self.config.latent_channels, self.dtype, None)

    def moments(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [b, H, W, 3] in [-1, 1] → (mean, log-variance) [b, H/f, W/f, latent_channels]
        fp32, for a KL loss.

        Sides that are no multiple of f lose the remainder, as in the reference. Raises UserError on
        any other shape.
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
        """Latents [b, h, w, latent_channels], unscaled → images [b, h · f, w · f, 3] fp32, about
        [-1, 1] and not clipped."""
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
        """Images → (reconstruction, mean, log-variance). With a key the decoder sees a draw from
        the posterior, else its mean."""
        mean, log_variance = self.moments(images)
        latents = mean
        if key is not None:
            latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return self.decode(latents), mean, log_variance

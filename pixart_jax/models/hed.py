"""HED: the edge network whose maps condition PixArt's ControlNet (holistically-nested edge
detection, arXiv 1504.06375; the weights' own variant with one projection a block).

Five blocks of 3×3 convolutions, each at half the resolution of the one before. A 1×1 projection
makes one channel of each block's output; the edge map is the sigmoid of their mean at full size.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError
from pixart_jax.models.configs import HEDConfig
from pixart_jax.models.layers import param, zeros
from pixart_jax.models.vae import Convolution, lecun
from pixart_jax.parallel.axes import CONV_IN


class HED(nn.Module):
    """Images [b, H, W, 3] of 0 … 255 → edges [b, H, W] fp32 of 0 … 1. An odd side loses its last
    row or column where it is halved, as in the reference."""

    config: HEDConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        least = 2 ** (len(self.config.widths) - 1)
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < least:
            shape = tuple(images.shape)
            raise UserError(f"images {shape}: want [b, H, W, 3] with sides of at least {least}")
        norm = param(self, "norm", zeros, (1, 3, 1, 1), (None,) * 4)
        x = images.astype(jnp.float32) - norm.reshape(3)
        logits = []
        for block, (width, layers) in enumerate(zip(self.config.widths, self.config.layers), 1):
            if block > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for layer in range(layers):
                conv = Convolution(width, dtype=self.dtype, name=f"block{block}_conv{layer}")
                x = nn.relu(conv(x))
            edges = nn.Dense(
                1,
                dtype=self.dtype,
                kernel_init=nn.with_logical_partitioning(lecun, (CONV_IN, None)),
                bias_init=nn.with_logical_partitioning(zeros, (None,)),
                name=f"block{block}_projection",
            )(x).astype(jnp.float32)
            logits.append(jax.image.resize(edges, (*images.shape[:3], 1), "bilinear"))
        return nn.sigmoid(sum(logits) / len(logits))[..., 0]

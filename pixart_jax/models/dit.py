"""The class-conditional DiT (adaLN-zero): the model of the first training stage."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixart_jax.models.configs import DiTConfig
from pixart_jax.models.embedders import LabelEmbedder, PatchEmbedder, ScalarEmbedder, unpatchify
from pixart_jax.models.layers import (
    Dense,
    Mlp,
    SelfAttention,
    modulated_norm,
    row_major,
    scan_blocks,
    zeros,
)
from pixart_jax.models.remat import policy, remat
from pixart_jax.models.ring import check_context_attention
from pixart_jax.parallel.axes import ACTIVATION, CONDITION, EMBED, MODULATION


class DiTBlock(nn.Module):
    """Self-attention and MLP, modulated by the block's own network, which starts at zero."""

    config: DiTConfig
    dtype: jnp.dtype = jnp.float32
    context_attention: str = "all_gather"

    def setup(self):
        c = self.config
        self.modulation = Dense(
            6 * c.width, (EMBED, MODULATION), zeros, precision=jax.lax.Precision.HIGHEST
        )
        self.attn = SelfAttention(
            c.heads, False, c.attention_backend, self.dtype, self.context_attention
        )
        self.mlp = Mlp(c.mlp_width, c.width, dtype=self.dtype)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """x [b, n, d], condition [b, d] fp32 (after SiLU) → [b, n, d]."""
        x = row_major(nn.with_logical_constraint(x, ACTIVATION))
        modulation = nn.with_logical_constraint(self.modulation(condition), CONDITION)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation, 6, axis=-1)
        x = nn.with_logical_constraint(
            x + gate_a[:, None].astype(x.dtype) * self.attn(modulated_norm(x, shift_a, scale_a)),
            ACTIVATION,
        )
        x = x + gate_m[:, None].astype(x.dtype) * self.mlp(modulated_norm(x, shift_m, scale_m))
        return nn.with_logical_constraint(x, ACTIVATION)


class DiT(nn.Module):
    """ε and variance logits of noisy latents, given a timestep and a class. Parameters and
    precision as in PixArtTransformer."""

    config: DiTConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"  # a policy of models/remat.py
    context_attention: str = "all_gather"  # of models/ring.py

    def setup(self):
        c = self.config
        policy(self.remat)
        check_context_attention(self.context_attention)
        self.patch_embedder = PatchEmbedder(c, self.dtype)
        self.timestep_embedder = ScalarEmbedder(c.width)
        self.label_embedder = LabelEmbedder(c.num_classes, c.width)
        self.blocks = DiTBlock(c, self.dtype, self.context_attention)
        self.final_modulation = Dense(
            2 * c.width, (EMBED, MODULATION), zeros, precision=jax.lax.Precision.HIGHEST
        )
        self.final = Dense(c.patch_size**2 * c.out_channels, (EMBED, None), zeros, self.dtype)

    def __call__(
        self,
        latents: jax.Array,  # [b, h, w, in_channels]
        timesteps: jax.Array,  # [b] fp32
        labels: jax.Array,  # [b] int; num_classes: no class
    ) -> jax.Array:  # [b, h, w, out_channels] fp32
        c = self.config
        rows, columns = c.grid(latents.shape)
        x = nn.with_logical_constraint(self.patch_embedder(latents), ACTIVATION)
        t = self.timestep_embedder(
            jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), (x.shape[0],))
        )
        condition = nn.with_logical_constraint(nn.silu(t + self.label_embedder(labels)), CONDITION)
        step = remat(lambda block, x, condition: (block(x, condition), None), self.remat)
        x, _ = scan_blocks(step, c.depth)(self.blocks, x, condition)
        shift, scale = jnp.split(self.final_modulation(condition), 2, axis=-1)
        x = self.final(modulated_norm(x, shift, scale))
        return unpatchify(x.astype(jnp.float32), rows, columns, c.patch_size)

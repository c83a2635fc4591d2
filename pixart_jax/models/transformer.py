"""The PixArt-α transformer (arXiv 2310.00426, section 2.3): DiT blocks with cross-attention to the
text, and one modulation network for all blocks (adaLN-single)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError
from pixart_jax.models.configs import ControlNetConfig, TransformerConfig
from pixart_jax.models.embedders import PatchEmbedder, ScalarEmbedder, normal, unpatchify
from pixart_jax.models.layers import (
    Compression,
    CrossAttention,
    Dense,
    KVCompression,
    Mlp,
    SelfAttention,
    modulated_norm,
    param,
    row_major,
    scan_blocks,
    zeros,
)
from pixart_jax.models.remat import policy, remat
from pixart_jax.models.ring import check_context_attention
from pixart_jax.parallel.axes import (
    ACT_EMBED,
    ACTIVATION,
    BATCH,
    CONDITION,
    EMBED,
    MLP,
    MODULATION,
    NORM,
    TEXT,
    TEXT_ACTIVATION,
    TEXT_TOKENS,
)


class TextKV(NamedTuple):
    """A prompt, encoded for sampling: every block's keys and values. They are the same at every
    step."""

    keys: jax.Array  # [depth, b, l, k, h]
    values: jax.Array  # [depth, b, l, k, h]
    lengths: jax.Array  # [b] int


class ProjectedText(NamedTuple):
    """A prompt for one evaluation: each block computes its own keys and values."""

    states: jax.Array  # [b, l, d], after the caption projection
    lengths: jax.Array  # [b] int


class Conditioning(NamedTuple):
    """The time and the image's size, embedded.

    The 1 stands for the batch where all images share them (without size conditions). With a leading
    axis [steps, …] those of every step.
    """

    vector: jax.Array  # [b or 1, d] fp32, modulates the final layer
    modulation: jax.Array  # [b or 1, 6, d] fp32, the output of t_block


# the three terms that a block adds to the residual stream
PARTS = ("attention", "cross_attention", "mlp")


class BlockCache(NamedTuple):
    """Parts of the blocks that an evaluation may take from an earlier one; some or all of PARTS, by
    name.

    recompute: bool [depth], whether each block computes the part. cached: [depth, b, n, d], the
    part's last output in each block, before its gate; read where recompute is False.
    """

    recompute: dict[str, jax.Array]
    cached: dict[str, jax.Array]


def compute(part: Callable, block: nn.Module, x: jax.Array) -> jax.Array:
    """The output [b, n, d] of one of a block's parts."""
    return part(block, x)


def compute_or_reuse(
    cache: BlockCache, outputs: dict, part: Callable, block: nn.Module, x: jax.Array
) -> jax.Array:
    """As :func:`compute`; a part in this block's ``cache`` is computed only where the cache says
    so, and its output put into ``outputs``."""
    name = part.__name__

    def reuse(block, x):
        return cache.cached[name]

    if name not in cache.recompute:
        return part(block, x)
    outputs[name] = nn.cond(cache.recompute[name], part, reuse, block, x)
    return outputs[name]


class Block(nn.Module):
    """Self-attention, cross-attention and MLP. Self-attention and MLP are modulated by the block's
    table + t_block(t)."""

    config: TransformerConfig | ControlNetConfig
    dtype: jnp.dtype = jnp.float32
    context_attention: str = "all_gather"

    def setup(self):
        c = self.config
        # a standard deviation of 1/√d: the gates do not start at zero
        init = nn.initializers.normal(c.width**-0.5)
        self.table = param(self, "table", init, (6, c.width), (None, NORM))
        self.attn = SelfAttention(
            c.heads, c.qk_norm, c.attention_backend, self.dtype, self.context_attention
        )
        self.cross_attn = CrossAttention(c.width, c.heads, c.attention_backend, self.dtype)
        self.mlp = Mlp(c.mlp_width, c.width, dtype=self.dtype)

    def keys_values(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projected text [b, l, d] → this block's keys and values, each [b, l, k, h]."""
        return self.cross_attn.keys_values(text)

    def __call__(
        self,
        x: jax.Array,  # [b, n, d]
        modulation: jax.Array,  # [b, 6, d] fp32
        keys: jax.Array,  # [b, l, k, h]
        values: jax.Array,  # [b, l, k, h]
        lengths: jax.Array,  # [b]
        compression: Compression | None,  # this layer's; None in a model without
        grid: tuple[int, int],  # (rows, columns) of the n patches
        run: Callable = compute,  # (part, block, x) → the part's output
        identity: jax.Array | None = None,  # bool [b], of SelfAttention
    ) -> jax.Array:  # [b, n, d]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.moveaxis(
            self.table + modulation, 1, 0
        )

        def attention(block: Block, x: jax.Array) -> jax.Array:
            return block.attn(modulated_norm(x, shift_a, scale_a), compression, grid, identity)

        def cross_attention(block: Block, x: jax.Array) -> jax.Array:
            return block.cross_attn(x, keys, values, lengths)

        def mlp(block: Block, x: jax.Array) -> jax.Array:
            return block.mlp(modulated_norm(x, shift_m, scale_m))

        x = row_major(_stream(x))
        x = _stream(x + _gate(gate_a, x) * run(attention, self, x))
        x = _stream(x + run(cross_attention, self, x))
        return _stream(x + _gate(gate_m, x) * run(mlp, self, x))


def _stream(x: jax.Array) -> jax.Array:
    """The residual stream [b, n, d], whole along d on every device: what tensor parallelism splits
    is summed here."""
    return nn.with_logical_constraint(x, ACTIVATION)


def _gate(gate: jax.Array, x: jax.Array) -> jax.Array:
    """[b, d] fp32 → [b, 1, d] in the stream's dtype."""
    return gate[:, None].astype(x.dtype)


class PixArtTransformer(nn.Module):
    """ε and variance logits of noisy latents, given a timestep and a text.

    Parameters are fp32 and stacked over the blocks, params["blocks"][…] [depth, …]. The blocks
    compute in dtype; timestep, sizes, modulation, norms and softmax in fp32.
    params["null_caption"] [text_tokens, caption_width] replaces dropped captions: random at init,
    read by the trainer, never by this module, and never trained.
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"  # a policy of models/remat.py
    context_attention: str = "all_gather"  # of models/ring.py, where image tokens are split

    def setup(self):
        c = self.config
        policy(self.remat)  # an unknown name fails before anything is computed
        check_context_attention(self.context_attention)
        high = jax.lax.Precision.HIGHEST
        self.patch_embedder = PatchEmbedder(c, self.dtype)
        self.timestep_embedder = ScalarEmbedder(c.width)
        if c.size_conditions:
            self.size_embedder = ScalarEmbedder(c.width // 3)
            self.ratio_embedder = ScalarEmbedder(c.width // 3)
        self.t_block = Dense(6 * c.width, (EMBED, MODULATION), normal, precision=high)
        self.caption_projection = Mlp(
            c.width, c.width, (TEXT, MLP, EMBED), normal, self.dtype, TEXT_TOKENS
        )
        self.blocks = Block(c, self.dtype, self.context_attention)
        if c.kv_compression > 1:
            self.kv_compression = KVCompression(
                c.kv_compression, c.kv_compression_layers, c.depth, c.width
            )
        init = nn.initializers.normal(c.width**-0.5)
        self.final_table = param(self, "final_table", init, (2, c.width), (None, NORM))
        self.final = Dense(c.patch_size**2 * c.out_channels, (EMBED, None), zeros, self.dtype)
        if self.is_initializing():
            init = nn.initializers.normal(c.caption_width**-0.5)
            param(self, "null_caption", init, (c.text_tokens, c.caption_width), (None, TEXT))

    def __call__(
        self,
        latents: jax.Array,  # [b, h, w, in_channels]
        timesteps: jax.Array,  # [b] fp32, 0 … 999, may be fractional
        text_states: jax.Array,  # [b, l, caption_width]
        text_lengths: jax.Array,  # [b] int
        size: jax.Array | None = None,  # [b, 2] (height, width) in pixels, with size_conditions
        aspect_ratio: jax.Array | None = None,  # [b] height / width, with size_conditions
    ) -> jax.Array:  # [b, h, w, out_channels] fp32
        """One evaluation."""
        arguments = latents, timesteps, text_states, text_lengths, size, aspect_ratio
        return self.denoise(latents, *self.conditioned(*arguments))[0]

    def conditioned(
        self, latents, timesteps, text_states, text_lengths, size, aspect_ratio
    ) -> tuple[Conditioning, ProjectedText]:
        """What :meth:`denoise` takes, of the arguments of a call."""
        text = ProjectedText(self._project(text_states), text_lengths)
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), latents.shape[:1])
        vector = nn.with_logical_constraint(
            self._condition(timesteps, size, aspect_ratio), CONDITION
        )
        modulation = nn.with_logical_constraint(self._modulation(vector), (BATCH, None, ACT_EMBED))
        return Conditioning(vector, modulation), text

    def denoise(
        self,
        latents: jax.Array,  # [b, h, w, in_channels]
        conditioning: Conditioning,
        text: TextKV | ProjectedText,
        cache: BlockCache | None = None,
        identity: jax.Array | None = None,  # bool [depth, b]
        control: NamedTuple | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One evaluation, with time and text already encoded: [b, h, w, out_channels] fp32, and of
        the parts in ``cache`` the outputs [depth, b, n, d], for the next evaluation's cache.
        identity: where self-attention is perturbed, as PAG does (layers.SelfAttention). control:
        what a ControlledTransformer reads (models/controlnet.py)."""
        c = self.config
        rows, columns = grid = c.grid(latents.shape)

        def block_step(block, x, per_block, modulation, states, lengths):
            keys_values, compression, cache, identity = per_block
            keys, values = keys_values or block.keys_values(states)
            outputs: dict[str, jax.Array] = {}
            run = functools.partial(compute_or_reuse, cache, outputs) if cache else compute
            x = block(x, modulation, keys, values, lengths, compression, grid, run, identity)
            return x, outputs

        keys_values, states = (
            ((text.keys, text.values), None) if isinstance(text, TextKV) else (None, text.states)
        )
        x = _stream(self.patch_embedder(latents))
        per_block = keys_values, self._compression(rows, columns), cache, identity
        shared = conditioning.modulation, states, text.lengths
        x, outputs = self._run_blocks(block_step, x, per_block, shared, control)
        shift, scale = jnp.moveaxis(self.final_table + conditioning.vector[:, None], 1, 0)
        x = self.final(modulated_norm(x, shift, scale))
        return unpatchify(x.astype(jnp.float32), rows, columns, c.patch_size), outputs

    def _run_blocks(
        self, step: Callable, x: jax.Array, per_block: tuple, shared: tuple, control: Any
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """All blocks of x [b, n, d], by step(block, x, its row of per_block, *shared) → (x, its
        outputs)."""
        in_axes = (0, *[nn.broadcast] * 3)
        scan = scan_blocks(remat(step, self.remat), self.config.depth, in_axes)
        return scan(self.blocks, x, per_block, *shared)

    def encode_text(self, text_states: jax.Array, text_lengths: jax.Array) -> TextKV:
        """Text states [b, l, caption_width], lengths [b] → every block's keys and values."""
        return TextKV(*self._keys_values(self._project(text_states)), text_lengths)

    def _keys_values(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projected text [b, l, d] → keys and values [depth, b, l, k, h]."""

        def step(block, carry, text):
            return carry, block.keys_values(text)

        return scan_blocks(step, self.config.depth)(self.blocks, (), text)[1]

    def encode_times(
        self,
        timesteps: jax.Array,  # [s], of all steps at once
        size: jax.Array | None = None,  # [b, 2], as in __call__
        aspect_ratio: jax.Array | None = None,  # [b]
    ) -> Conditioning:  # vector [s, b or 1, d], modulation [s, b or 1, 6, d]
        timesteps = jnp.asarray(timesteps, jnp.float32)[:, None]
        vector = self._condition(timesteps, size, aspect_ratio)
        return Conditioning(vector, self._modulation(vector))

    def _project(self, text_states: jax.Array) -> jax.Array:
        """[b, l, caption_width] → [b, l, d]."""
        if text_states.shape[-1] != self.config.caption_width:
            raise UserError(
                f"text states {tuple(text_states.shape)} do not fit: want [b, l, "
                f"{self.config.caption_width}]"
            )
        return nn.with_logical_constraint(self.caption_projection(text_states), TEXT_ACTIVATION)

    def _condition(
        self, timesteps: jax.Array, size: jax.Array | None, aspect_ratio: jax.Array | None
    ) -> jax.Array:
        """The conditioning vector, fp32: the timestep and, in the multi-scale model, height, width
        and aspect ratio. timesteps [b] → [b, d], or [s, 1] → [s, b or 1, d]."""
        t = self.timestep_embedder(timesteps)
        if self.config.size_conditions:
            if size is None or aspect_ratio is None:
                raise UserError(
                    "this model has size conditions: give size [b, 2] (height, width in pixels) "
                    "and aspect_ratio [b]"
                )
            sizes = self.size_embedder(size).reshape(len(size), -1)  # [b, 2, d/3] → [b, 2d/3]
            t = t + jnp.concatenate([sizes, self.ratio_embedder(aspect_ratio)], axis=-1)
        return t

    def _modulation(self, vector: jax.Array) -> jax.Array:
        """[…, d] → […, 6, d]."""
        return self.t_block(nn.silu(vector)).reshape(*vector.shape[:-1], 6, self.config.width)

    def _compression(self, rows: int, columns: int) -> Compression | None:
        """Every layer's key and value compression on a grid of patches, stacked [depth, …]; None in
        a model without."""
        c = self.config
        if c.kv_compression == 1:
            return None
        compression = self.kv_compression()
        if self.is_initializing():  # the parameters exist now, and init uses a grid of one patch
            return None
        if min(rows, columns) < c.kv_compression:
            side = c.kv_compression * c.patch_size
            raise UserError(
                f"a grid of {rows} × {columns} patches is too small for kv_compression = "
                f"{c.kv_compression}: latents of at least {side} × {side} would do"
            )
        return compression

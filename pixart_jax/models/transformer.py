"""The PixArt-α transformer: text-conditioned, with one modulation network for all blocks
(adaLN-single)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError
from pixart_jax.models.context import check_context_attention
from pixart_jax.models.embedders import PatchEmbedder, ScalarEmbedder, normal, unpatchify
from pixart_jax.models.geometry import BackboneConfig
from pixart_jax.models.kv_compression import Compression, KVCompression
from pixart_jax.models.layers import (
    CrossAttention,
    Dense,
    Mlp,
    SelfAttention,
    modulated_norm,
    row_major,
    zeros,
)
from pixart_jax.models.remat import policy, remat
from pixart_jax.parallel.axes import (
    ACT_EMBED,
    ACTIVATION,
    BATCH,
    CONDITION,
    EMBED,
    LAYERS,
    MLP,
    MODULATION,
    NORM,
    TEXT,
    TEXT_ACTIVATION,
    TEXT_TOKENS,
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig(BackboneConfig):
    """Sizes of a PixArt transformer.

    size_conditions: the multi-scale model, told the image's size and aspect ratio. text_tokens: the
    longest caption, and the length of the null caption. qk_norm: LayerNorm on the queries and keys
    of self-attention (PixArt-Σ's option).
    kv_compression: R, where the self-attention of kv_compression_layers (counted from 0) reads one
    key and value for every R × R patches (PixArt-Σ: 2, in the last 14 of 28); 1: nowhere.
    """

    caption_width: int = 4096
    text_tokens: int = 120
    size_conditions: bool = False
    qk_norm: bool = False
    kv_compression: int = 1
    kv_compression_layers: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        # a list, as JSON has it, is no key of jit
        object.__setattr__(self, "kv_compression_layers", tuple(self.kv_compression_layers))
        for field in ("caption_width", "text_tokens"):
            self.require(getattr(self, field) >= 1, field, "must be at least 1")
        self.require(
            not self.size_conditions or self.width % 3 == 0,
            "width",
            "must be a multiple of 3 with size_conditions (height, width, ratio)",
        )
        self.require(self.kv_compression >= 1, "kv_compression", "must be at least 1 (1: none)")
        layers = self.kv_compression_layers
        self.require(
            bool(layers) == (self.kv_compression > 1),
            "kv_compression_layers",
            f"must name {'at least one layer' if self.kv_compression > 1 else 'no layer'} with "
            f"kv_compression = {self.kv_compression}",
        )
        self.require(
            all(isinstance(layer, int) and 0 <= layer < self.depth for layer in layers)
            and list(layers) == sorted(set(layers)),
            "kv_compression_layers",
            f"must be layers of 0 … {self.depth - 1}, each once and in ascending order",
        )


# of a block: the three sums that it adds to the residual stream
PARTS = ("attention", "cross_attention", "mlp")


class TextKV(NamedTuple):
    """All that the denoiser needs of a prompt; it does not change over the steps of sampling."""

    keys: jax.Array  # [depth, b, l, k, h]
    values: jax.Array  # [depth, b, l, k, h]
    lengths: jax.Array  # [b] int


class Conditioning(NamedTuple):
    """All that the denoiser needs of a time and an image's size; it depends on neither latents nor
    text.

    The 1 stands for the batch where every image is told the same, in a model without size
    conditions. With a leading axis [steps, …], every step's.
    """

    vector: jax.Array  # [b or 1, d] fp32, what the final layer is modulated by
    modulation: jax.Array  # [b or 1, 6, d] fp32, t_block's output


class BlockCache(NamedTuple):
    """What an evaluation takes over from an earlier one, and what of it is made afresh: of some or
    all of PARTS, by name.

    fresh: bool [depth], whether each block computes this part. outputs: [depth, b, n, d], what each
    block's part gave when it was last computed, before its gate; read where it is not fresh.
    """

    recompute: dict[str, jax.Array]
    cached: dict[str, jax.Array]


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; the first and the last modulated by table +
    t_block(t)."""

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    context_attention: str = "all_gather"

    def setup(self):
        c = self.config
        # Drawn at 1/√d, so the gates do not start at zero.
        table = nn.with_logical_partitioning(nn.initializers.normal(c.width**-0.5), (None, NORM))
        self.table = self.param("table", table, (6, c.width), jnp.float32)
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
        kept: BlockCache | None = None,  # this block's, without the leading axis
        # [b, n, d], and the parts' outputs, of those that kept names
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = {}

        def part(name, compute, *operands):
            if kept is None or name not in kept.recompute:
                return compute(self, *operands)
            out = nn.cond(
                kept.recompute[name],
                compute,
                lambda block, *operands: kept.cached[name],
                self,
                *operands,
            )
            outputs[name] = out
            return out

        x = row_major(nn.with_logical_constraint(x, ACTIVATION))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.moveaxis(
            self.table + modulation, 1, 0
        )
        # Constrained after each sum, so that what tensor's parts add up to is summed there, and the
        # stream stays whole along d.
        attended = part(
            "attention",
            lambda block, x: block.attn(modulated_norm(x, shift_a, scale_a), compression, grid),
            x,
        )
        x = nn.with_logical_constraint(x + gate_a[:, None].astype(x.dtype) * attended, ACTIVATION)
        x = nn.with_logical_constraint(
            x
            + part(
                "cross_attention", lambda block, x: block.cross_attn(x, keys, values, lengths), x
            ),
            ACTIVATION,
        )
        x = x + gate_m[:, None].astype(x.dtype) * part(
            "mlp", lambda block, x: block.mlp(modulated_norm(x, shift_m, scale_m)), x
        )
        return nn.with_logical_constraint(x, ACTIVATION), outputs


class PixArtTransformer(nn.Module):
    """ε and variance logits of noisy latents, given a timestep and a text.

    Parameters are fp32 and stacked over the blocks, params["blocks"][…] [depth, …]; the blocks
    compute in dtype, while the timestep, sizes, modulation, norms and softmax stay in fp32.
    params["null_caption"] [text_tokens, caption_width] is what
    a dropped caption is replaced by: drawn at init, read by the trainer, never by this module, and
    never trained.
    """

    config: TransformerConfig
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"  # a name of models/remat.py
    # a name of models/context.py; read where image tokens are split over devices
    context_attention: str = "all_gather"

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
        final_table = nn.with_logical_partitioning(
            nn.initializers.normal(c.width**-0.5), (None, NORM)
        )
        self.final_table = self.param("final_table", final_table, (2, c.width), jnp.float32)
        self.final = Dense(c.patch_size**2 * c.out_channels, (EMBED, None), zeros, self.dtype)
        if self.is_initializing():
            null = nn.with_logical_partitioning(
                nn.initializers.normal(c.caption_width**-0.5), (None, TEXT)
            )
            self.param("null_caption", null, (c.text_tokens, c.caption_width), jnp.float32)

    def __call__(
        self,
        latents: jax.Array,  # [b, h, w, in_channels]
        timesteps: jax.Array,  # [b] fp32, 0 … 999, may be fractional
        text_states: jax.Array,  # [b, l, caption_width]
        text_lengths: jax.Array,  # [b] int
        # [b, 2] (height, width) in pixels; read only with size_conditions
        size: jax.Array | None = None,
        aspect_ratio: jax.Array | None = None,  # [b] height / width; likewise
    ) -> jax.Array:  # [b, h, w, out_channels] fp32
        """One evaluation; equal to encode_text, encode_times and denoise, but each block makes its
        keys and values where it needs them."""
        text, grid = self._project(text_states), self.config.grid(latents.shape)

        def step(block, x, per_block, modulation, text, lengths):
            _, compression, _ = per_block
            return block(x, modulation, *block.keys_values(text), lengths, compression, grid)

        timesteps = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), latents.shape[:1])
        vector = nn.with_logical_constraint(
            self._condition(timesteps, size, aspect_ratio), CONDITION
        )
        modulation = nn.with_logical_constraint(self._modulation(vector), (BATCH, None, ACT_EMBED))
        return self._denoise(
            latents, Conditioning(vector, modulation), step, None, (text, text_lengths)
        )[0]

    def encode_text(self, text_states: jax.Array, text_lengths: jax.Array) -> TextKV:
        """Text states [b, l, caption_width], lengths [b] → every block's keys and values: the work
        that depends on the prompt alone."""
        text = self._project(text_states)
        scan = self._scan(
            lambda block, carry, _, text: (carry, block.keys_values(text)), broadcast=1
        )
        _, (keys, values) = scan(self.blocks, (), None, text)
        return TextKV(keys, values, text_lengths)

    def encode_times(
        self,
        timesteps: jax.Array,
        size: jax.Array | None = None,
        aspect_ratio: jax.Array | None = None,
    ) -> Conditioning:  # vector [s, b or 1, d], modulation [s, b or 1, 6, d]
        """The work that depends on the times alone, of all steps at once: timesteps [s]; size [b,
        2], aspect_ratio [b] as in __call__."""
        timesteps = jnp.asarray(timesteps, jnp.float32)[:, None]
        vector = self._condition(timesteps, size, aspect_ratio)
        return Conditioning(vector, self._modulation(vector))

    def denoise(
        self,
        latents: jax.Array,
        conditioning: Conditioning,
        text: TextKV,
        kept: BlockCache | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """One evaluation, time and text already encoded: latents [b, h, w, in_channels] → [b, h, w,
        out_channels] fp32 and the outputs [depth, b, n, d] of the parts that ``kept`` names, as the
        next evaluation may take them over."""
        grid = self.config.grid(latents.shape)

        def step(block, x, per_block, modulation, lengths):
            keys_values, compression, kept = per_block
            return block(x, modulation, *keys_values, lengths, compression, grid, kept)

        return self._denoise(
            latents, conditioning, step, (text.keys, text.values), (text.lengths,), kept
        )

    def _project(self, text_states: jax.Array) -> jax.Array:
        if text_states.shape[-1] != self.config.caption_width:
            raise UserError(
                f"text states {tuple(text_states.shape)} do not fit: want [b, l, "
                f"{self.config.caption_width}]"
            )
        return nn.with_logical_constraint(self.caption_projection(text_states), TEXT_ACTIVATION)

    def _scan(self, step, broadcast: int):
        """One loop over the stacked blocks; step(block, carry, per_block, *broadcast) → (carry,
        out)."""
        return nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * broadcast),
            length=self.config.depth,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )

    def _condition(
        self, timesteps: jax.Array, size: jax.Array | None, aspect_ratio: jax.Array | None
    ) -> jax.Array:
        """The conditioning vector, fp32, of the timestep and, in the multi-scale model, height,
        width and aspect ratio: timesteps [b] → [b, d], or [s, 1] → [s, b or 1, d]."""
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
        # the parameters are made, and any grid will do to make them: one patch, too
        if self.is_initializing():
            return None
        if min(rows, columns) < c.kv_compression:
            raise UserError(
                f"a grid of {rows} × {columns} patches is too small for kv_compression = "
                f"{c.kv_compression}: "
                f"latents of at least {c.kv_compression * c.patch_size} × "
                f"{c.kv_compression * c.patch_size} would do"
            )
        return compression

    def _denoise(
        self, latents, conditioning, step, per_block, shared, kept=None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        c = self.config
        rows, columns = c.grid(latents.shape)
        x = nn.with_logical_constraint(self.patch_embedder(latents), ACTIVATION)
        scan = self._scan(remat(step, self.remat), broadcast=1 + len(shared))
        x, outputs = scan(
            self.blocks,
            x,
            (per_block, self._compression(rows, columns), kept),
            conditioning.modulation,
            *shared,
        )
        shift, scale = jnp.moveaxis(self.final_table + conditioning.vector[:, None], 1, 0)
        x = self.final(modulated_norm(x, shift, scale))
        return unpatchify(x.astype(jnp.float32), rows, columns, c.patch_size), outputs

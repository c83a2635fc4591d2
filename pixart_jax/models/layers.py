"""Layers of the transformer and the DiT: dense, adaptive norm, MLP, attentions, key and value
compression."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from pixart_jax.models.attention import attention, platform
from pixart_jax.models.ring import context_parallel_attention
from pixart_jax.parallel.axes import (
    ACT_HEADS,
    ACT_MLP,
    BATCH,
    EMBED,
    HEADS,
    LAYERS,
    MLP,
    NORM,
    TEXT_TOKENS,
    TOKENS,
)

zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
LORA = "lora"  # the variable collection of a low-rank adapter (models/lora.py)
DROPOUT = "dropout"  # the random numbers of its dropout


def param(
    module: nn.Module,
    name: str,
    init: Callable,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
) -> jax.Array:
    """An fp32 parameter of the module, with logical axis names."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)


def scan_blocks(step: Callable, depth: int, in_axes=nn.broadcast) -> Callable:
    """One loop over stacked blocks, whose parameters have a leading axis [depth, …]; step(block,
    carry, *inputs) → (carry, output). in_axes: 0 for inputs with that axis, else nn.broadcast."""
    return nn.scan(
        step,
        variable_axes={"params": 0, LORA: 0},
        split_rngs={"params": True, DROPOUT: True},
        in_axes=in_axes,
        length=depth,
        metadata_params={nn.PARTITION_NAME: LAYERS},
    )


def xavier(fan_in: int, fan_out: int) -> Callable:
    """Xavier-uniform with given fans: the published models initialise q, k and v as one matrix,
    whose fans differ from those of its parts."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def adapted(
    module: nn.Module, x: jax.Array, kernel: jax.Array, product: jax.Array, precision=None
) -> jax.Array:
    """``product`` = x · kernel [.., out], with what the module's adapter adds to it; unchanged
    where the collection "lora" has none.

    x [.., in] and kernel [in, out] in the dtype of the computation. The collection has a […, r] and
    b [r, out], fp32 with the scale in b; DoRA's magnitude [out]; and, for dropout of the adapter's
    input, the share keep, which acts where random numbers are given. The gradient does not pass
    through DoRA's norm (arXiv 2402.09353, section 4.3).
    """
    if not module.has_variable(LORA, "a"):
        return product
    a, b = (module.get_variable(LORA, name) for name in ("a", "b"))
    a = a.reshape(-1, a.shape[-1])
    dropped = module.has_variable(LORA, "keep") and module.has_rng(DROPOUT)
    if dropped:
        keep = module.get_variable(LORA, "keep")
        kept = jax.random.bernoulli(module.make_rng(DROPOUT), keep, x.shape)
        x = jnp.where(kept, x / keep.astype(x.dtype), 0)
    dot = functools.partial(jnp.dot, precision=precision)
    added = dot(dot(x, a.astype(x.dtype)), b.astype(x.dtype))
    if not module.has_variable(LORA, "magnitude"):
        return product + added
    whole = kernel.astype(jnp.float32) + jax.lax.stop_gradient(a @ b)
    factor = module.get_variable(LORA, "magnitude") / jnp.linalg.norm(whole, axis=0)
    base = dot(x, kernel) if dropped else product
    return product + (factor - 1).astype(x.dtype) * base + factor.astype(x.dtype) * added


class Dense(nn.Module):
    """x · kernel + bias on the last axis, with logical axis names; parameters fp32, computation in
    dtype. The kernel may be int8 values with scales (quantization.py)."""

    features: int
    axes: tuple[str | None, str | None]  # (in, out)
    kernel_init: Callable | None = None  # None: Xavier-uniform with this matrix's fans
    dtype: jnp.dtype = jnp.float32
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = self.kernel_init or xavier(x.shape[-1], self.features)
        # a bias of width d is too small to gather
        out = NORM if self.axes[1] == EMBED else self.axes[1]
        kernel = param(self, "kernel", init, (x.shape[-1], self.features), self.axes)
        bias = param(self, "bias", zeros, (self.features,), (out,))
        if hasattr(kernel, "qvalue"):
            from pixart_jax.models import quantization  # imports Qwix, 0.4 s

            kernel = quantization.dequantize(kernel, self.axes, self.dtype)
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, kernel, bias))
        product = jnp.dot(x, kernel, precision=self.precision)
        return adapted(self, x, kernel, product, self.precision) + bias


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """adaLN: LayerNorm of x [b, n, d] without weights, then · (1 + scale) + shift, both [b, d];
    computed in fp32, returned in x's dtype."""
    normed = _normalize(x.astype(jnp.float32), 1e-6)
    return (normed * (1.0 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def _normalize(x: jax.Array, epsilon: float) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def row_major(x: jax.Array) -> jax.Array:
    """x [b, n, d], constrained on a GPU to the row-major layout.

    Without it XLA's backward pass there wants the stream as [b, d, n] and transposes the saved
    values of each block: one copy of the whole stack, and several of a block's stream. A TPU's
    compiler chooses its layouts; a CPU supports no constraint.
    """
    return with_layout_constraint(x, Layout((0, 1, 2))) if platform() == "gpu" else x


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear; [b, n, d_in] → [b, n, out]. tokens: the logical name of the
    n."""

    hidden: int
    out: int
    axes: tuple[str | None, str | None, str | None] = (EMBED, MLP, EMBED)
    kernel_init: Callable | None = None
    dtype: jnp.dtype = jnp.float32
    tokens: str = TOKENS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Dense(self.hidden, self.axes[:2], self.kernel_init, self.dtype, name="fc1")(x)
        # otherwise fc2 may gather its kernel over tensor
        x = nn.with_logical_constraint(x, (BATCH, self.tokens, ACT_MLP))
        return Dense(self.out, self.axes[1:], self.kernel_init, self.dtype, name="fc2")(
            nn.gelu(x, approximate=True)
        )


class Compression(NamedTuple):
    """One layer's key and value compression; with a leading axis [depth, …] every layer's."""

    here: jax.Array  # bool: whether this layer compresses; if not, the rest is unused
    kernel: jax.Array  # [R, R, 1, d]
    bias: jax.Array  # [d]
    norm_scale: jax.Array  # [d]
    norm_bias: jax.Array  # [d]


class KVCompression(nn.Module):
    """Key and value compression (PixArt-Σ, arXiv 2403.04692): some layers' self-attention reads the
    keys and values of a coarser grid of image tokens.

    Every R × R patches give one key and one value, by a depthwise convolution of kernel and stride
    R, initialised to their mean, and a LayerNorm; keys and values share both. Queries keep the full
    grid, so a layer's attention costs 1/R². The parameters are fp32, stacked over the compressed
    layers only; a call returns them for every layer.
    """

    ratio: int  # R
    layers: tuple[int, ...]
    depth: int
    width: int

    @nn.compact
    def __call__(self) -> Compression:
        count, r, d = len(self.layers), self.ratio, self.width
        vector = (count, d), (LAYERS, NORM)
        axes = (LAYERS, None, None, None, NORM)
        stacked = (
            param(self, "kernel", nn.initializers.constant(1 / r**2), (count, r, r, 1, d), axes),
            param(self, "bias", zeros, *vector),
            param(self, "norm_scale", ones, *vector),
            param(self, "norm_bias", zeros, *vector),
        )
        here, row = np.zeros(self.depth, bool), np.zeros(self.depth, int)
        here[list(self.layers)], row[list(self.layers)] = True, np.arange(count)
        return Compression(jnp.asarray(here), *(leaf[row] for leaf in stacked))


def compress(tokens: jax.Array, grid: tuple[int, int], compression: Compression) -> jax.Array:
    """Keys or values [b, rows · columns, d] → [b, rows // R · columns // R, d], in their dtype;
    computed in fp32.

    Rows and columns after the last whole R × R are dropped, as by a convolution without padding.
    """
    b, _, d = tokens.shape
    r = compression.kernel.shape[0]
    rows, columns = (side // r for side in grid)
    x = tokens.reshape(b, *grid, d)[:, : rows * r, : columns * r].astype(jnp.float32)
    x = x.reshape(b, rows, r, columns, r, d) * compression.kernel.reshape(r, 1, r, d)
    x = (x.sum((2, 4)) + compression.bias).reshape(b, rows * columns, d)
    normed = _normalize(x, 1e-5)
    return (normed * compression.norm_scale + compression.norm_bias).astype(tokens.dtype)


def _backend(module: SelfAttention | CrossAttention) -> str:
    """The module's backend; for init, which may run on another platform than training, xla."""
    return "xla" if module.is_initializing() else module.backend


class SelfAttention(nn.Module):
    """Multi-head attention of the image tokens [b, n, d] over themselves, or over the compressed
    keys and values of a coarser grid.

    compression: this layer's; None: no layer compresses. grid: (rows, columns) of the n tokens, for
    compression. identity: bool [b], the rows in which each token attends to itself alone
    (perturbed-attention guidance); None: none. Where the tokens are split over devices,
    context_attention says how keys and values meet all queries (models/ring.py); compressed ones,
    R² times fewer, are gathered in any case. q, k and v are three products: one fused product was
    not faster in any measurement (docs/benchmarks.md), and XLA fuses small ones on GPUs.
    """

    heads: int
    qk_norm: bool = False  # LayerNorm over the full width of q and of k, before the heads are split
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    context_attention: str = "all_gather"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        compression: Compression | None = None,
        grid: tuple[int, int] = (0, 0),
        identity: jax.Array | None = None,
    ) -> jax.Array:
        b, n, d = x.shape

        def attend(q, k, v, how=self.context_attention):
            q, k, v = (a.reshape(b, a.shape[1], self.heads, d // self.heads) for a in (q, k, v))
            return context_parallel_attention(
                q, k, v, backend=_backend(self), context_attention=how
            )

        q, k, v = (
            Dense(d, (EMBED, HEADS), xavier(d, 3 * d), self.dtype, name=name)(x)
            for name in ("q", "k", "v")
        )
        if self.qk_norm:
            q, k = (
                nn.LayerNorm(
                    epsilon=1e-5,
                    dtype=self.dtype,
                    scale_init=nn.with_logical_partitioning(ones, (NORM,)),
                    bias_init=nn.with_logical_partitioning(zeros, (NORM,)),
                    name=name,
                )(a)
                for name, a in (("q_norm", q), ("k_norm", k))
            )
        if compression is None:
            x = attend(q, k, v)
        else:
            shrink = functools.partial(compress, grid=grid, compression=compression)
            x = jax.lax.cond(
                compression.here,
                lambda q, k, v: attend(q, shrink(k), shrink(v), "replicated"),
                attend,
                q,
                k,
                v,
            )
        if identity is not None:
            x = jnp.where(identity[:, None, None], v, x)
        return Dense(d, (HEADS, EMBED), dtype=self.dtype, name="out")(x)


class CrossAttention(nn.Module):
    """Multi-head attention of the image tokens over the text; the output projection starts at zero.

    Keys and values depend on the text only: ``keys_values`` computes them once for all steps.
    """

    width: int
    heads: int
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        d = self.width
        self.q = Dense(d, (EMBED, HEADS), dtype=self.dtype)
        self.k = Dense(d, (EMBED, HEADS), xavier(d, 2 * d), self.dtype)
        self.v = Dense(d, (EMBED, HEADS), xavier(d, 2 * d), self.dtype)
        self.out = Dense(d, (HEADS, EMBED), zeros, self.dtype)

    def keys_values(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Projected text [b, l, d] → keys and values, each [b, l, k, h]."""
        shape = (*text.shape[:2], self.heads, self.width // self.heads)
        keys, values = (a.reshape(shape) for a in (self.k(text), self.v(text)))
        return tuple(
            nn.with_logical_constraint(a, (BATCH, TEXT_TOKENS, ACT_HEADS, None))
            for a in (keys, values)
        )

    def __call__(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        """x [b, n, d], keys and values [b, l, k, h], lengths [b] → [b, n, d]."""
        b, n, d = x.shape
        q = nn.with_logical_constraint(
            self.q(x).reshape(b, n, self.heads, d // self.heads), (BATCH, TOKENS, ACT_HEADS, None)
        )
        out = attention(q, keys, values, lengths=lengths, backend=_backend(self)).reshape(b, n, d)
        return self.out(out)

"""The layers that the transformer and the DiT are made of: dense, adaptive norm, MLP,
attentions."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from pixart_jax.models.attention import attention, platform
from pixart_jax.models.context import context_parallel_attention
from pixart_jax.models.kv_compression import Compression, compress
from pixart_jax.parallel.axes import (
    ACT_HEADS,
    ACT_MLP,
    BATCH,
    EMBED,
    HEADS,
    MLP,
    NORM,
    TEXT_TOKENS,
    TOKENS,
)

zeros = nn.initializers.zeros_init()


def xavier(fan_in: int, fan_out: int) -> Callable:
    """Xavier-uniform for stated fans: the published models draw q, k and v as one matrix, whose
    fans are not those of its parts."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Dense(nn.Module):
    """x · kernel + bias on the last axis, with logical axis names; parameters fp32, computation in
    dtype."""

    features: int
    axes: tuple[str | None, str | None]  # (in, out)
    kernel_init: Callable | None = None  # None: xavier-uniform on this very matrix
    dtype: jnp.dtype = jnp.float32
    precision: jax.lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = self.kernel_init or xavier(x.shape[-1], self.features)
        # a bias of width d is too small to be worth a gather
        out = NORM if self.axes[1] == EMBED else self.axes[1]
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(init, self.axes),
            (x.shape[-1], self.features),
            jnp.float32,
        )
        bias = self.param(
            "bias", nn.with_logical_partitioning(zeros, (out,)), (self.features,), jnp.float32
        )
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, kernel, bias))
        return jnp.dot(x, kernel, precision=self.precision) + bias


def modulated_norm(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """LayerNorm of x [b, n, d] without weights of its own, then · (1 + scale) + shift, both [b, d];
    in fp32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    return (normed * (1.0 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def row_major(x: jax.Array) -> jax.Array:
    """x [b, n, d]; on a GPU, told to lie as it is written.

    Left alone, XLA has the backward pass want the stream as [b, d, n], and turns around what each
    block kept for it: one transposed copy of the whole stack, and several of a block's stream. A
    TPU's layouts are its compiler's to choose; a CPU knows no constraint.
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
        # else fc2 may gather its kernel over tensor
        x = nn.with_logical_constraint(x, (BATCH, self.tokens, ACT_MLP))
        return Dense(self.out, self.axes[1:], self.kernel_init, self.dtype, name="fc2")(
            nn.gelu(x, approximate=True)
        )


def _backend(module: SelfAttention | CrossAttention) -> str:
    """Its backend; while parameters are made, which may be elsewhere than where they will be used,
    the one that runs anywhere."""
    return "xla" if module.is_initializing() else module.backend


class SelfAttention(nn.Module):
    """Multi-head attention of the image tokens [b, n, d] over themselves, or over fewer keys and
    values made of them.

    compression, grid: what KVCompression gives this layer, and the (rows, columns) of the n tokens;
    None: no layer compresses. Only the way that ``compression.here`` says is computed. Where the
    tokens are split over devices, context_attention says how keys and values meet all queries
    (models/context.py); compressed ones, R² times fewer, are gathered in any case. q, k and v are
    three products: joined to one by us they were faster in no work that was measured
    (docs/benchmarks.md), and where small, XLA joins them on GPUs.
    """

    heads: int
    qk_norm: bool = False  # LayerNorm over the full width of q and of k, before the heads part
    backend: str = "auto"
    dtype: jnp.dtype = jnp.float32
    context_attention: str = "all_gather"

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        compression: Compression | None = None,
        grid: tuple[int, int] | None = None,
    ) -> jax.Array:
        b, n, d = x.shape

        def attend(q, k, v, how=self.context_attention):
            q, k, v = (a.reshape(b, a.shape[1], self.heads, d // self.heads) for a in (q, k, v))
            return context_parallel_attention(
                q, k, v, backend=_backend(self), context_attention=how
            )

        def attend_compressed(q, k, v):
            return attend(
                q, compress(k, grid, compression), compress(v, grid, compression), "replicated"
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
                    scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), (NORM,)),
                    bias_init=nn.with_logical_partitioning(zeros, (NORM,)),
                    name=name,
                )(a)
                for name, a in (("q_norm", q), ("k_norm", k))
            )
        x = (
            attend(q, k, v)
            if compression is None
            else jax.lax.cond(compression.here, attend_compressed, attend, q, k, v)
        )
        return Dense(d, (HEADS, EMBED), dtype=self.dtype, name="out")(x)


class CrossAttention(nn.Module):
    """Multi-head attention of the image tokens over the text; its output projection starts at zero.

    The keys and values depend on the text alone, so they have a method of their own.
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

"""The T5 v1.1 encoder (arXiv 1910.10683, with the gated GELU of arXiv 2002.05202): text → states.

There are no absolute positions: every layer adds the same learned bias to its attention logits, by
the bucket of the distance between two tokens. Attention is not scaled by 1/√d_kv; T5's
initialisation does that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.attention import attention
from pixart_jax.models.configs import T5Config
from pixart_jax.models.layers import ones, param, scan_blocks
from pixart_jax.models.remat import policy, remat
from pixart_jax.parallel.axes import EMBED, HEADS, MLP, NORM, TEXT_ACTIVATION, VOCAB

QUANTIZATIONS = ("int8",)


def relative_buckets(
    length: int, buckets: int = 32, max_distance: int = 128, *, causal: bool = False
) -> np.ndarray:
    """Bucket of the distance key − query for every pair, int32 [length queries, length keys].

    Half of the buckets are for keys after the query (with causal, for a decoder: none, and those
    keys share bucket 0). Of each half, one half holds single distances from 0 on, the other widens
    logarithmically up to max_distance; larger distances share the last bucket.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets if causal else buckets // 2
    exact = half // 2
    magnitude = np.maximum(-distance, 0) if causal else np.abs(distance)
    # In fp32, as in the reference: a distance at the edge of a bucket must round to the same side.
    steps = np.log(np.maximum(magnitude, 1).astype(np.float32) / np.float32(exact))
    steps = steps / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    wide = np.minimum(exact + steps.astype(np.int32), half - 1)
    ahead = np.where(distance > 0, 0 if causal else half, 0)
    return (ahead + np.where(magnitude < exact, magnitude, wide)).astype(np.int32)


def relative_bias(module: nn.Module, config: T5Config) -> jax.Array:
    """The table [buckets, k] of attention biases, a parameter of the module."""
    init = nn.initializers.normal(config.d_model**-0.5)
    shape = (config.relative_attention_num_buckets, config.num_heads)
    return param(module, "relative_bias", init, shape, (None, None))


def attention_bias(
    config: T5Config, table: jax.Array, length: int, *, causal: bool = False
) -> jax.Array:
    """The biases [1, k, l, l] of every pair of tokens."""
    buckets = relative_buckets(
        length,
        config.relative_attention_num_buckets,
        config.relative_attention_max_distance,
        causal=causal,
    )
    return table[buckets].transpose(2, 0, 1)[None]


class RMSNorm(nn.Module):
    """x / rms(x) · scale, in fp32; returned in dtype."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", ones, (x.shape[-1],), (NORM,))
        wide = x.astype(jnp.float32)
        rms = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        return (wide * rms * scale).astype(self.dtype)


def check_quantization(name: str | None) -> None:
    """Raise UserError for an unknown quantization; None: float kernels."""
    if name not in (None, *QUANTIZATIONS):
        raise UserError(f"quantization {name!r} is unknown{nearest(str(name), QUANTIZATIONS)}")


class Projection(nn.Module):
    """x · kernel on the last axis; T5 has no biases. With quantization the kernel is int8 values
    and scales (quantization.py)."""

    features: int
    std: float  # of the initial kernel
    axes: tuple[str, str]
    dtype: jnp.dtype = jnp.float32
    quantization: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, init = (x.shape[-1], self.features), nn.initializers.normal(self.std)
        if self.quantization:
            from pixart_jax.models import quantization  # imports Qwix, 0.4 s

            kernel = self.param("kernel", quantization.quantized(init, self.axes), shape)
        else:
            kernel = param(self, "kernel", init, shape, self.axes)
        # Flax compares shapes only, which int8 values and floats share.
        if hasattr(kernel, "qvalue") != bool(self.quantization):
            held = "floats" if self.quantization else "int8 values"
            raise UserError(
                f"{'/'.join(self.path)}/kernel holds {held}, which a T5 with "
                f"quantization={self.quantization!r} does not take"
            )
        if self.quantization:
            kernel = quantization.dequantize(kernel, self.axes, self.dtype)
        return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype))


def attend(project: Callable, config: T5Config, x, states, *, bias=None, lengths=None):
    """Attention of x [b, n, d] over states [b, m, d], both normed → [b, n, d]. project(features,
    std, axes, name): a projection of the calling block."""
    c, d = config, x.shape[-1]
    inner = c.num_heads * c.d_kv
    q = project(inner, (d * c.d_kv) ** -0.5, (EMBED, HEADS), "q")(x)
    k = project(inner, d**-0.5, (EMBED, HEADS), "k")(states)
    v = project(inner, d**-0.5, (EMBED, HEADS), "v")(states)
    q, k, v = (a.reshape(*a.shape[:2], c.num_heads, c.d_kv) for a in (q, k, v))
    y = attention(q, k, v, lengths=lengths, bias=bias, scale=1.0).reshape(*x.shape[:2], inner)
    return project(d, inner**-0.5, (HEADS, EMBED), "out")(y)


def feed_forward(project: Callable, config: T5Config, x):
    """wo(gelu(wi_0(x)) · wi_1(x)); x [b, n, d], normed. project: as for :func:`attend`."""
    d, hidden = x.shape[-1], config.d_ff
    gate = nn.gelu(project(hidden, d**-0.5, (EMBED, MLP), "wi_0")(x), approximate=True)
    y = gate * project(hidden, d**-0.5, (EMBED, MLP), "wi_1")(x)
    return project(d, hidden**-0.5, (MLP, EMBED), "wo")(y)


class T5Block(nn.Module):
    """x += attention(norm(x)); x += feed_forward(norm(x))."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32
    quantization: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, lengths: jax.Array) -> jax.Array:
        """x [b, l, d] fp32, bias [1, k, l, l] fp32, lengths [b] → [b, l, d] fp32."""
        c = self.config

        def project(features, std, axes, name):
            return Projection(features, std, axes, self.dtype, self.quantization, name=name)

        x = nn.with_logical_constraint(x, TEXT_ACTIVATION)
        y = RMSNorm(c.layer_norm_epsilon, self.dtype, name="attention_norm")(x)
        x = x + attend(project, c, y, y, bias=bias, lengths=lengths)
        y = RMSNorm(c.layer_norm_epsilon, self.dtype, name="mlp_norm")(x)
        x = x + feed_forward(project, c, y)
        return nn.with_logical_constraint(x, TEXT_ACTIVATION)


class T5Encoder(nn.Module):
    """Token ids → states of the last layer, normed.

    Parameters are fp32, stacked over the blocks (params["blocks"][…] [num_layers, …]). Products
    compute in dtype; the residual stream, norms and softmax in fp32, because T5's activations
    overflow half precision. quantization "int8": the blocks' kernels are int8 values with a scale
    per output channel (Qwix arrays), a quarter of fp32's memory, and converted to dtype a layer at
    a time.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"  # a policy of models/remat.py
    quantization: str | None = None  # one of QUANTIZATIONS

    def setup(self):
        c = self.config
        policy(self.remat)  # an unknown name fails before anything is computed
        check_quantization(self.quantization)
        normal = nn.initializers.normal
        table = (c.vocab_size, c.d_model)
        self.embedding = param(self, "embedding", normal(1.0), table, (VOCAB, EMBED))
        self.relative_bias = relative_bias(self, c)
        self.blocks = T5Block(c, self.dtype, self.quantization)
        self.final_norm = RMSNorm(c.layer_norm_epsilon)

    def __call__(
        self,
        input_ids: jax.Array,  # [b, l] int
        lengths: jax.Array,  # [b] int: tokens of each text, with the closing one
    ) -> jax.Array:  # [b, l, d_model] fp32; undefined from lengths on
        c = self.config
        if input_ids.ndim != 2 or lengths.shape != input_ids.shape[:1]:
            raise UserError(
                f"input_ids {tuple(input_ids.shape)} and lengths {tuple(lengths.shape)} do not "
                "fit: [b, l] and [b] would"
            )
        x = self.embedding[input_ids].astype(jnp.float32)
        x = nn.with_logical_constraint(x, TEXT_ACTIVATION)
        bias = attention_bias(c, self.relative_bias, x.shape[1])
        step = remat(lambda block, x, bias, lengths: (block(x, bias, lengths), None), self.remat)
        x, _ = scan_blocks(step, c.num_layers)(self.blocks, x, bias, lengths)
        return self.final_norm(x)

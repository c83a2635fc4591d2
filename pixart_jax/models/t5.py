"""The T5 v1.1 encoder (Raffel et al. 2020, arXiv 1910.10683; gated GELU as Shazeer 2020, arXiv
2002.05202): text → states.

No absolute positions: every layer adds the same learned bias to its attention logits, looked up by
the distance between two tokens in buckets. Attention is not scaled by 1/√d_kv; T5's initialisation
takes that over.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.attention import attention
from pixart_jax.models.remat import policy, remat
from pixart_jax.parallel.axes import EMBED, HEADS, LAYERS, MLP, NORM, TEXT_ACTIVATION, VOCAB

QUANTIZATIONS = ("int8",)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder; the defaults are T5-XXL's (4.76G parameters). Names as in
    transformers' config.json."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        for field in ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"):
            self._require(getattr(self, field) >= 1, field, "must be at least 1")
        buckets = self.relative_attention_num_buckets
        self._require(
            buckets >= 4 and buckets % 4 == 0,
            "relative_attention_num_buckets",
            "must be a multiple of 4",
        )
        self._require(
            self.relative_attention_max_distance > buckets // 4,
            "relative_attention_max_distance",
            f"must be more than relative_attention_num_buckets / 4 = {buckets // 4}",
        )
        self._require(self.layer_norm_epsilon > 0, "layer_norm_epsilon", "must be positive")

    def _require(self, condition: bool, field: str, what: str) -> None:
        if not condition:
            raise UserError(f"T5Config.{field} = {getattr(self, field)!r}: {what}")


def relative_buckets(
    length: int, buckets: int = 32, max_distance: int = 128, *, causal: bool = False
) -> np.ndarray:
    """Bucket of the distance key − query for every pair, int32 [length queries, length keys].

    Half of the buckets are for keys behind the query (causal, a decoder's: none, and such keys
    share bucket 0). Of each half, one half holds single distances from 0 on and the other widens
    logarithmically up to max_distance; what lies beyond shares the last one.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets if causal else buckets // 2
    exact = half // 2
    magnitude = np.maximum(-distance, 0) if causal else np.abs(distance)
    # In fp32, as the reference rounds it: a distance at the edge of a bucket must fall to the same
    # side.
    steps = np.log(np.maximum(magnitude, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    wide = np.minimum(exact + (steps * np.float32(half - exact)).astype(np.int32), half - 1)
    behind = 0 if causal else half
    return (
        np.where(distance > 0, behind, 0) + np.where(magnitude < exact, magnitude, wide)
    ).astype(np.int32)


def _normal(std: float, axes: tuple):
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


class RMSNorm(nn.Module):
    """x / rms(x) · scale in fp32, no mean taken off, no bias; returned in dtype."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), (NORM,)),
            (x.shape[-1],),
            jnp.float32,
        )
        wide = x.astype(jnp.float32)
        return (
            wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon) * scale
        ).astype(self.dtype)


def check_quantization(name: str | None) -> None:
    """Raises UserError when there is no such way to hold the kernels; None holds them as floats."""
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
        shape = (x.shape[-1], self.features)
        if self.quantization is None:
            kernel = self._checked(
                self.param("kernel", _normal(self.std, self.axes), shape, jnp.float32)
            ).astype(self.dtype)
        else:
            from pixart_jax.models import quantization  # see there

            init = quantization.quantized(nn.initializers.normal(self.std), self.axes)
            kernel = quantization.dequantize(
                self._checked(self.param("kernel", init, shape)), self.axes, self.dtype
            )
        return jnp.dot(x.astype(self.dtype), kernel)

    def _checked(self, kernel):
        """Flax compares shapes alone, and those int8 values and floats have in common."""
        if hasattr(kernel, "qvalue") != (self.quantization is not None):
            held = "floats" if self.quantization else "int8 values"
            raise UserError(
                f"{'/'.join(self.path)}/kernel holds {held}, which a T5 with "
                f"quantization={self.quantization!r} does not take"
            )
        return kernel


class T5Block(nn.Module):
    """x += attention(norm(x)); x += wo(gelu(wi_0(norm(x))) · wi_1(norm(x)))."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32
    quantization: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, lengths: jax.Array) -> jax.Array:
        """x [b, l, d] fp32, bias [1, k, l, l] fp32, lengths [b] → [b, l, d] fp32."""
        c = self.config
        b, n, d = x.shape
        inner = c.num_heads * c.d_kv

        def project(features, std, axes, name):
            return Projection(features, std, axes, self.dtype, self.quantization, name=name)

        x = nn.with_logical_constraint(x, TEXT_ACTIVATION)
        y = RMSNorm(c.layer_norm_epsilon, self.dtype, name="attention_norm")(x)
        q = project(inner, (d * c.d_kv) ** -0.5, (EMBED, HEADS), "q")(y)
        k = project(inner, d**-0.5, (EMBED, HEADS), "k")(y)
        v = project(inner, d**-0.5, (EMBED, HEADS), "v")(y)
        q, k, v = (a.reshape(b, n, c.num_heads, c.d_kv) for a in (q, k, v))
        y = attention(q, k, v, lengths=lengths, bias=bias, scale=1.0).reshape(b, n, inner)
        x = x + project(d, inner**-0.5, (HEADS, EMBED), "out")(y)

        y = RMSNorm(c.layer_norm_epsilon, self.dtype, name="mlp_norm")(x)
        gate = nn.gelu(project(c.d_ff, d**-0.5, (EMBED, MLP), "wi_0")(y), approximate=True)
        y = gate * project(c.d_ff, d**-0.5, (EMBED, MLP), "wi_1")(y)
        x = x + project(d, c.d_ff**-0.5, (MLP, EMBED), "wo")(y)
        return nn.with_logical_constraint(x, TEXT_ACTIVATION)


class T5Encoder(nn.Module):
    """Token ids → states of the last layer, normed.

    Parameters are fp32, stacked over the blocks (params["blocks"][…] [num_layers, …]); the products
    compute in dtype, while the residual stream, norms and softmax stay in fp32: T5's activations
    outgrow half precision. params["embedding"] [vocab_size, d_model] is the table. quantization
    "int8": the blocks' kernels are held as int8 values with a scale an output channel (Qwix
    arrays), a quarter of fp32's memory; they are turned to dtype a layer at a time.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"  # a name of models/remat.py
    quantization: str | None = None  # a name of QUANTIZATIONS

    def setup(self):
        c = self.config
        policy(self.remat)  # an unknown name fails before anything is computed
        check_quantization(self.quantization)
        self.embedding = self.param(
            "embedding", _normal(1.0, (VOCAB, EMBED)), (c.vocab_size, c.d_model), jnp.float32
        )
        shape = (c.relative_attention_num_buckets, c.num_heads)
        self.relative_bias = self.param(
            "relative_bias", _normal(c.d_model**-0.5, (None, None)), shape, jnp.float32
        )
        self.blocks = T5Block(c, self.dtype, self.quantization)
        self.final_norm = RMSNorm(c.layer_norm_epsilon)

    def __call__(
        self,
        input_ids: jax.Array,  # [b, l] int
        lengths: jax.Array,  # [b] int: tokens of each text that count, the closing one included
    ) -> jax.Array:  # [b, l, d_model] fp32; positions from lengths on hold nothing of use
        c = self.config
        if input_ids.ndim != 2 or lengths.shape != input_ids.shape[:1]:
            raise UserError(
                f"input_ids {tuple(input_ids.shape)} and lengths {tuple(lengths.shape)} do not "
                "fit: [b, l] and [b] would"
            )
        x = nn.with_logical_constraint(
            self.embedding[input_ids].astype(jnp.float32), TEXT_ACTIVATION
        )
        buckets = relative_buckets(
            x.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance
        )
        bias = self.relative_bias[buckets].transpose(2, 0, 1)[None]  # [1, k, l, l]
        scan = nn.scan(
            remat(lambda block, x, bias, lengths: (block(x, bias, lengths), None), self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )
        x, _ = scan(self.blocks, x, bias, lengths)
        return self.final_norm(x)

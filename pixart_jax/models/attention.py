"""Attention behind one function: which backend computes a call, and the backends.

name     platform   dtypes       limits                                   implementation
xla      any        any          none                                     two products and a softmax
cudnn    CUDA       bf16, fp16   heads: a multiple of 8, ≤ 128; no bias   cuDNN's flash attention
splash   TPU        bf16, fp32   no bias                                  JAX's Pallas kernel

"auto" weighs the memory traffic of dense attention against the fixed cost of a kernel. Dense
attention moves each logit of a query, key and head: 4 bytes written, 4 read by the softmax, 2 and 2
for the weights. A logit costs 4·h FLOPs, so heads of 72 give 24 FLOPs a byte, where an H200 needs
206 and a TPU v5e 240: dense attention is bound by memory at any size. A flash kernel moves queries,
keys, values and output only, 8·h bytes a token and head.

- On CUDA the kernel wins when a query's logits take more bytes than its vectors: 12·m > 4·h, so
  m > h/3. Captions of 120 or 300 tokens are far above that. A block holds 128 keys; below 64 most
  of it is padding, and dense attention is used.
- On a TPU each iteration of a kernel costs about 0.35 µs, in which a v5p moves 1 MB: the dense
  logits of 1,024 queries and 80 keys. The kernel also needs a copy that puts heads before tokens.
  From 256 keys on (self-attention at 256 px) it is not slower on a v5e, and it wins at every larger
  size. Keys with lengths (captions) are padded to whole lanes, 300 to 384, and masked once for each
  head: they stay dense below 512.

The backward pass reads what is marked ATTENTION_OUT for models/remat.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from pixart_jax.errors import UserError
from pixart_jax.models.configs import check_backend
from pixart_jax.models.remat import ATTENTION_OUT
from pixart_jax.parallel.axes import ACT_HEADS, BATCH

# the fewest keys from which "auto" uses the kernel
CUDNN_KEYS, SPLASH_KEYS, SPLASH_KEYS_WITH_LENGTHS = 64, 256, 512
# Finite, so that a row without keys stays a number; far below any logit in fp32.
_MASKED = -1e30
LANES = 128  # of a TPU's vector memory
LARGEST_BLOCK = 1024  # tokens; the logits of a block are 4 MB of a core's vector memory


def attention(
    q: jax.Array,  # [b, n, k, h]
    k: jax.Array,  # [b, m, k, h]
    v: jax.Array,  # [b, m, k, h]
    *,
    lengths: jax.Array | None = None,  # [b] int: each sample's number of keys; 0 gives zeros
    bias: jax.Array | None = None,  # broadcastable to [b, k, n, m], added to the scaled logits
    scale: float | None = None,  # of q·k; None: 1/√h
    backend: str = "auto",
) -> jax.Array:  # [b, n, k, h], v's dtype
    """Softmax attention of n queries over m keys in k heads of width h; logits and softmax in fp32
    whatever the inputs' dtype. UserError where the backend cannot compute this call here."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    n, m, h = q.shape[1], k.shape[1], q.shape[-1]
    shape = AttentionShape(platform(), n, m, h, q.dtype, lengths is not None, bias is not None)
    chosen = resolve_backend(backend, shape)
    if chosen == "xla":
        return dense_attention(q, k, v, lengths, bias, scale)
    kernel = {"cudnn": cudnn_attention, "splash": splash_attention}[chosen]
    return shard_kernel(kernel, q, k, v, lengths, scale)


# ---- the choice of a backend ----


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """What the choice depends on: platform 'tpu', 'gpu' or 'cpu', numbers of queries and keys,
    width of a head, dtype, and whether there are lengths and a bias."""

    platform: str
    queries: int
    keys: int
    head_dim: int
    dtype: jnp.dtype
    lengths: bool = False
    bias: bool = False


def choose(shape: AttentionShape) -> str:
    """The backend that "auto" uses for this call."""
    if shape.platform == "gpu":
        name, enough = "cudnn", shape.keys >= CUDNN_KEYS
    else:
        fewest = SPLASH_KEYS_WITH_LENGTHS if shape.lengths else SPLASH_KEYS
        name, enough = "splash", min(shape.queries, shape.keys) >= fewest
    return name if enough and unsupported_reason(name, shape) is None else "xla"


def unsupported_reason(name: str, shape: AttentionShape) -> str | None:
    """Why this backend cannot compute this call; None where it can."""
    if name == "xla":
        return None
    needed, device, dtypes = {
        "cudnn": ("gpu", "a CUDA GPU", ("bfloat16", "float16")),
        "splash": ("tpu", "a TPU", ("bfloat16", "float32")),
    }[name]
    if shape.platform != needed:
        return f"runs on {device}, and this program is for a {shape.platform.upper()}"
    if jnp.dtype(shape.dtype).name not in dtypes:
        return f"computes in {' or '.join(dtypes)}, not in {jnp.dtype(shape.dtype).name}"
    if shape.bias:
        return "is used here without a bias on the logits"
    if name == "cudnn" and (shape.head_dim % 8 or shape.head_dim > 128):
        return f"takes heads of a multiple of 8, 128 at most, not of {shape.head_dim}"
    return None


def resolve_backend(name: str, shape: AttentionShape) -> str:
    """The backend of this name, "auto" resolved. UserError where it is unknown or cannot compute
    the call."""
    check_backend(name)
    if name == "auto":
        return choose(shape)
    if reason := unsupported_reason(name, shape):
        raise UserError(f"attention_backend {name!r} {reason}; 'auto' would take {choose(shape)!r}")
    return name


def platform() -> str:
    """The platform of the program that is being traced: 'tpu', 'gpu' or 'cpu'.

    That of the mesh that jax.set_mesh has set, which may be a description (planning compiles for
    absent devices); without a mesh, of this process's default devices.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


# ---- the backends: q [b, n, k, h], k and v [b, m, k, h], lengths [b] or None → [b, n, k, h] ----


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Two products and a softmax, the reference for the kernels; logits [b, k, n, m] in fp32."""
    logits = jnp.einsum("bnkh,bmkh->bknm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if lengths is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        valid = (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None, :]  # [b, 1, 1, m]
        weights = jax.nn.softmax(jnp.where(valid, logits, _MASKED), axis=-1)
        # without keys the output is zero, not the mean of the padding
        weights = jnp.where(valid, weights, 0.0)
    return checkpoint_output(jnp.einsum("bknm,bmkh->bnkh", weights.astype(v.dtype), v))


def checkpoint_output(out: jax.Array) -> jax.Array:
    """Mark out [b, n, k, h] for remat, with the heads fused: TPU memory would pad a last axis of
    one head's width to 128."""
    return checkpoint_name(out.reshape(*out.shape[:2], -1), ATTENTION_OUT).reshape(out.shape)


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, scale: float
) -> jax.Array:
    """cuDNN's flash attention. JAX wraps its forward kernel in a primitive of its own, whose
    results models/remat.py keeps by that primitive's name."""
    if lengths is None:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    lengths = lengths.astype(jnp.int32)
    # cuDNN does not document the gradient of keys beyond the length, nor a sample without keys.
    valid = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
    k, v = jnp.where(valid, k, 0), jnp.where(valid, v, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=jnp.maximum(lengths, 1), implementation="cudnn"
    )
    return jnp.where((lengths > 0)[:, None, None, None], out, 0)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    scale: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention for TPUs, for heads of any width. interpret: on a CPU, slowly.

    Heads of 72 take 128 lanes, as they do in the matrix unit for dense attention. Tokens are padded
    to whole blocks; padding and keys beyond the length are masked by segment ids. The scale is
    applied to q, in q's dtype.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    n, m = q.shape[1], k.shape[1]
    block_q, block_kv = splash_block(n), splash_block(m)
    padded_n, padded_m = _pad_to(n, block_q), _pad_to(m, block_kv)
    kernel = _splash_kernel(q.shape[2], padded_n, padded_m, block_q, block_kv, interpret)
    q = _heads_first(q * jnp.asarray(scale, q.dtype), padded_n)
    k, v = _heads_first(k, padded_m), _heads_first(v, padded_m)
    if lengths is None and padded_m == m:
        out = jax.vmap(kernel)(q, k, v)
    else:
        counted = jnp.full((q.shape[0],), m) if lengths is None else lengths
        keys = (jnp.arange(padded_m) < counted[:, None]).astype(jnp.int32)
        segments = SegmentIds(jnp.ones((q.shape[0], padded_n), jnp.int32), keys)
        out = jax.vmap(kernel)(q, k, v, segments)
    out = out.swapaxes(1, 2)[:, :n]
    # without keys the kernel gives the mean of the masked values
    return out if lengths is None else jnp.where((lengths > 0)[:, None, None, None], out, 0)


def splash_block(tokens: int) -> int:
    """Tokens of a block: a multiple of LANES, at most LARGEST_BLOCK, with the least padding after
    the last token; then the largest."""
    fewest = -(-tokens // LARGEST_BLOCK)
    sizes = (LANES * -(-tokens // (LANES * blocks)) for blocks in range(fewest, 2 * fewest + 1))
    return min(sizes, key=lambda size: (_pad_to(tokens, size), -size))


def _pad_to(tokens: int, size: int) -> int:
    return size * -(-tokens // size)


def _heads_first(a: jax.Array, tokens: int) -> jax.Array:
    """[b, n, k, h] → [b, k, tokens, h], padded with zeros."""
    return jnp.pad(a, ((0, 0), (0, tokens - a.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def _splash_kernel(heads: int, n: int, m: int, block_q: int, block_kv: int, interpret: bool):
    """[k, n, h], [k, m, h], [k, m, h] → [k, n, h]; output and logsumexp marked ATTENTION_OUT.

    With all keys in one block a fused kernel computes all three gradients; with more blocks it
    would hold a gradient of the queries for each of them.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    fused = block_kv == m
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )
    mask = splash.MultiHeadMask([splash.FullMask((n, m))] * heads)
    return splash.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=ATTENTION_OUT, interpret=interpret
    )


# ---- kernels over a mesh ----


def shard_kernel(
    kernel: Callable,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    scale: float,
) -> jax.Array:
    """kernel(q, k, v, lengths, scale) on each device's samples and heads, split by flax's logical
    axis rules; the partitioner cannot split a kernel itself.

    A dimension that its mesh axes do not divide stays whole. Without a mesh, without rules, or
    inside a shard_map (models/ring.py), the kernel is called directly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not nn.get_logical_axis_rules() or mesh.are_all_axes_manual:
        return kernel(q, k, v, lengths, scale)
    batch, heads = (
        _dividing(mesh, axes, size)
        for axes, size in zip(
            nn.logical_to_mesh_axes((BATCH, ACT_HEADS)), (q.shape[0], q.shape[2]), strict=True
        )
    )
    spec, more = PartitionSpec(batch, None, heads, None), () if lengths is None else (lengths,)
    run = jax.shard_map(
        lambda q, k, v, lengths=None: kernel(q, k, v, lengths, scale),
        in_specs=(spec,) * 3 + (PartitionSpec(batch),) * len(more),
        out_specs=spec,
        check_vma=False,
    )
    return run(q, k, v, *more)


def _dividing(mesh, axes, size: int):
    """The mesh axes, or None where together they do not divide the dimension."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    return axes if names and size % math.prod(mesh.shape[name] for name in names) == 0 else None

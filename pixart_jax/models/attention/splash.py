"""JAX's splash attention, a Pallas kernel for TPUs.

It takes any width of heads. One of 72 lies in 128 lanes, in the kernel's memory as in the matrix
unit, which contracts over 128 in any
case: the dense way pays the same there. Tokens are padded to whole blocks, and keys beyond the
length, or added so, are masked by segment.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pixart_jax.models.remat import ATTENTION_OUT

LANES = 128
LARGEST_BLOCK = 1024  # tokens; logits of a block are 4 MB of a core's vector memory


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    scale: float,
    *,
    interpret: bool = False,
) -> jax.Array:
    """q [b, n, k, h], k and v [b, m, k, h], lengths [b] or None → [b, n, k, h]. interpret: on a
    CPU, slowly.

    The scale goes into q, in q's dtype.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    n, m = q.shape[1], k.shape[1]
    block_q, block_kv = block(n), block(m)
    padded_n, padded_m = _padded(n, block_q), _padded(m, block_kv)
    kernel = _kernel(q.shape[2], padded_n, padded_m, block_q, block_kv, interpret)
    q, k, v = (
        _heads_first(a, size)
        for a, size in ((q * jnp.asarray(scale, q.dtype), padded_n), (k, padded_m), (v, padded_m))
    )
    if lengths is None and padded_m == m:
        out = jax.vmap(kernel)(q, k, v)
    else:
        counted = jnp.full((q.shape[0],), m) if lengths is None else lengths
        keys = (jnp.arange(padded_m) < counted[:, None]).astype(jnp.int32)
        segments = SegmentIds(jnp.ones((q.shape[0], padded_n), jnp.int32), keys)
        out = jax.vmap(kernel)(q, k, v, segments)
    out = out.swapaxes(1, 2)[:, :n]
    # Where every key is masked the kernel gives their values' mean.
    return out if lengths is None else jnp.where((lengths > 0)[:, None, None, None], out, 0)


def block(tokens: int) -> int:
    """Tokens of a block: a multiple of LANES, at most LARGEST_BLOCK, with the least padding behind
    the last one; then the largest."""
    fewest = -(-tokens // LARGEST_BLOCK)
    counts = range(fewest, 2 * fewest + 1)
    return min(
        (LANES * -(-tokens // (LANES * count)) for count in counts),
        key=lambda size: (_padded(tokens, size), -size),
    )


def _padded(tokens: int, size: int) -> int:
    return size * -(-tokens // size)


def _heads_first(a: jax.Array, tokens: int) -> jax.Array:
    """[b, n, k, h] → [b, k, tokens, h], zeros behind the n."""
    return jnp.pad(a, ((0, 0), (0, tokens - a.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)


def _kernel(heads: int, n: int, m: int, block_q: int, block_kv: int, interpret: bool):
    """[k, n, h], [k, m, h], [k, m, h] → [k, n, h]; output and the softmax's logarithm under
    ATTENTION_OUT.

    With all keys in one block, one kernel gives all three gradients; with more, it would hold a
    query gradient for each of them.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    fused = block_kv == m
    own = {} if fused else {"block_q_dq": block_q, "block_kv_dq": block_kv}
    sizes = library.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        use_fused_bwd_kernel=fused,
        **own,
    )
    mask = library.MultiHeadMask([library.FullMask((n, m))] * heads)
    return library.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name=ATTENTION_OUT, interpret=interpret
    )

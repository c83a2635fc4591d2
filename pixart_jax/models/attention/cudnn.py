"""cuDNN's flash attention, through JAX: fp16 and bf16 on a CUDA GPU.

Lengths are cuDNN's own, of each sample's keys; it takes no boolean mask. JAX gives its forward
kernel a primitive of its own, FORWARD, whose results, the output and the softmax's logarithm, are
what the backward kernel needs. models/remat.py keeps them by that name.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, scale: float
) -> jax.Array:
    """q [b, n, k, h], k and v [b, m, k, h], lengths [b] or None → [b, n, k, h]."""
    if lengths is None:
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
    lengths = lengths.astype(jnp.int32)
    some = (lengths > 0)[:, None, None, None]
    # What cuDNN writes as the gradient of keys beyond the length is not documented, nor what a
    # sample of no keys gives.
    valid = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
    k, v = jnp.where(valid, k, 0), jnp.where(valid, v, 0)
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=jnp.maximum(lengths, 1), implementation="cudnn"
    )
    return jnp.where(some, out, 0)

"""Attention as two matrix products and a softmax, on any platform, for any shape: what every other
backend is measured against."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pixart_jax.models.remat import ATTENTION_OUT

# Finite, so that a row with nothing to attend to stays a number; far below any logit in fp32.
_MASKED = -1e30


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Arguments and result as of attention(). The logits [b, k, n, m] go through memory in fp32."""
    logits = jnp.einsum("bnkh,bmkh->bknm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if lengths is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        valid = (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None, :]  # [b, 1, 1, m]
        weights = jax.nn.softmax(jnp.where(valid, logits, _MASKED), axis=-1)
        # no keys at all: the answer is zero, not the mean of the padding
        weights = jnp.where(valid, weights, 0.0)
    return checkpoint_output(jnp.einsum("bknm,bmkh->bnkh", weights.astype(v.dtype), v))


def checkpoint_output(out: jax.Array) -> jax.Array:
    """out [b, n, k, h] under its name for remat, with the heads fused: TPU memory would pad a last
    axis of one head's width to 128."""
    return checkpoint_name(out.reshape(*out.shape[:2], -1), ATTENTION_OUT).reshape(out.shape)

"""Attention behind one function; the backend is a name."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pixart_jax.errors import UserError, nearest

# Finite, so that a row with nothing to attend to stays a number; far below any logit in fp32.
_MASKED = -1e30


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, bias: jax.Array | None, scale: float) -> jax.Array:
    logits = jnp.einsum("bnkh,bmkh->bknm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if lengths is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        valid = (jnp.arange(k.shape[1]) < lengths[:, None])[:, None, None, :]  # [b, 1, 1, m]
        weights = jax.nn.softmax(jnp.where(valid, logits, _MASKED), axis=-1)
        weights = jnp.where(valid, weights, 0.0)  # no keys at all: the answer is zero, not the mean of the padding
    return jnp.einsum("bknm,bmkh->bnkh", weights.astype(v.dtype), v)


BACKENDS: dict[str, Callable] = {"xla": _xla}


def check_backend(name: str) -> None:
    """Raises UserError when no backend has this name."""
    if name not in BACKENDS:
        raise UserError(f"attention backend {name!r} is unknown{nearest(name, BACKENDS)}")


def attention(
    q: jax.Array,  # [b, n, k, h]
    k: jax.Array,  # [b, m, k, h]
    v: jax.Array,  # [b, m, k, h]
    *,
    lengths: jax.Array | None = None,  # [b] int: only the first so many keys of each sample count; 0 gives zeros
    bias: jax.Array | None = None,  # broadcastable to [b, k, n, m], added to the logits after scale
    scale: float | None = None,  # of q·k; None: 1/√h
    backend: str = "xla",
) -> jax.Array:  # [b, n, k, h], v's dtype
    """Softmax attention of n queries over m keys in k heads of width h; logits and softmax in fp32 whatever the inputs' dtype."""
    check_backend(backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[backend](q, k, v, lengths, bias, scale)

"""The one function that models call for attention."""

from __future__ import annotations

import jax

from pixart_jax.models.attention import cudnn, dense, splash
from pixart_jax.models.attention.backends import AttentionShape, platform, resolve_backend
from pixart_jax.models.attention.over_mesh import shard_kernel

_KERNELS = {"cudnn": cudnn.attend, "splash": splash.attend}


def attention(
    q: jax.Array,  # [b, n, k, h]
    k: jax.Array,  # [b, m, k, h]
    v: jax.Array,  # [b, m, k, h]
    *,
    # [b] int: only the first so many keys of each sample count; 0 gives zeros
    lengths: jax.Array | None = None,
    bias: jax.Array | None = None,  # broadcastable to [b, k, n, m], added to the logits after scale
    scale: float | None = None,  # of q·k; None: 1/√h
    backend: str = "auto",  # a name of backends.py
) -> jax.Array:  # [b, n, k, h], v's dtype
    """Softmax attention of n queries over m keys in k heads of width h; logits and softmax in fp32
    whatever the inputs' dtype.

    What its backward pass needs is marked ATTENTION_OUT for models/remat.py. UserError where the
    backend cannot compute this here.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    call = AttentionShape(
        platform(),
        q.shape[1],
        k.shape[1],
        q.shape[-1],
        q.dtype,
        lengths is not None,
        bias is not None,
    )
    chosen = resolve_backend(backend, call)
    if chosen == "xla":
        return dense.attend(q, k, v, lengths, bias, scale)
    return shard_kernel(_KERNELS[chosen], q, k, v, lengths, scale)

"""Self-attention whose image tokens are split over devices (context parallelism).

Each device holds the queries, keys and values of its share of the tokens; every query must see
every key:

all_gather  Keys and values are gathered over the devices, and the backward pass scatters the sums
            of their gradients: one collective each way, which overlaps with nothing. Every device
            holds all keys and values of its samples and heads while a block runs.
ring        Each device passes its keys and values on to the next one while it attends to those it
            has; a running maximum and sum, in fp32, join the parts (arXiv 2310.01889). The backward
            pass goes round once more, with the gradients of keys and values beside them. No device
            holds more than two shares, nor logits of more than one share of the keys.

The mesh is that of jax.set_mesh, the axes those of flax's logical_axis_rules: without either, or
with one device along ``tokens``, both are plain attention.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.attention import attention, checkpoint_output
from pixart_jax.models.configs import CONTEXT_ATTENTIONS
from pixart_jax.models.remat import ATTENTION_OUT
from pixart_jax.parallel.axes import ACT_HEADS, BATCH, TOKENS

_SPLIT, _WHOLE = (BATCH, TOKENS, ACT_HEADS, None), (BATCH, None, ACT_HEADS, None)  # [b, n, k, h]


def check_context_attention(name: str) -> None:
    """Raise UserError for an unknown name."""
    if name not in CONTEXT_ATTENTIONS:
        raise UserError(f"context_attention {name!r} is unknown{nearest(name, CONTEXT_ATTENTIONS)}")


def context_parallel_attention(
    q: jax.Array,  # [b, n, k, h]
    k: jax.Array,  # [b, m, k, h]
    v: jax.Array,  # [b, m, k, h]
    *,
    backend: str = "auto",
    context_attention: str = "all_gather",
) -> jax.Array:  # [b, n, k·h], v's dtype; marked for remat as attention()'s
    """Softmax attention, every query over every key. context_attention: one of CONTEXT_ATTENTIONS,
    or 'replicated' for keys and values that are few and whole on each device. UserError where the
    devices along ``tokens`` do not divide n."""
    b, n = q.shape[:2]
    axis, size = _token_axis()
    if size == 1:
        q, k, v = (nn.with_logical_constraint(a, _SPLIT) for a in (q, k, v))
        return attention(q, k, v, backend=backend).reshape(b, n, -1)
    if n % size:
        raise UserError(
            f"{n} image tokens do not cut into {size} equal parts (mesh axis {axis}): choose a "
            "size or an axis that divides"
        )

    def local(q, k, v):
        if context_attention == "ring":
            return _ring(q, k, v, axis)
        if context_attention == "all_gather":
            k, v = (jax.lax.all_gather(a, axis, axis=1, tiled=True) for a in (k, v))
        return attention(q, k, v, backend=backend)

    split, whole = (nn.logical_to_mesh_axes(names) for names in (_SPLIT, _WHOLE))
    keys = whole if context_attention == "replicated" else split
    run = jax.shard_map(local, in_specs=(split, keys, keys), out_specs=split, check_vma=False)
    return run(q, k, v).reshape(b, n, -1)


def _token_axis() -> tuple[str | None, int]:
    """The mesh axis that splits image tokens, and its size; (None, 1) where they are whole."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return None, 1
    (axis,) = nn.logical_to_mesh_axes((TOKENS,))
    return (axis, mesh.shape[axis]) if isinstance(axis, str) and axis in mesh.shape else (None, 1)


# ---- the ring; all arrays are one device's: q [b, n, k, h], k and v [b, m, k, h], statistics
# [b, k, n] fp32 ----


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _ring(q, k, v, axis):
    return _ring_forward(q, k, v, axis)[0]


def _ring_forward(q, k, v, axis):
    """(output, residuals): q, k, v, the output and the logsumexp of the logits."""
    turns, keys, values = jax.lax.axis_size(axis), k, v
    top = jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf)
    total, out = jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32)
    for turn in range(turns):  # unrolled, so that a transfer runs beside the turn's products
        following = _rotate((keys, values), axis) if turn + 1 < turns else None
        logits = _logits(q, keys)
        higher = jnp.maximum(top, logits.max(-1))
        weights, shrink = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
        total = total * shrink + weights.sum(-1)
        part = jnp.einsum(
            "bknm,bmkh->bnkh",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        out = out * _per_query(shrink) + part
        top, (keys, values) = higher, following or (keys, values)
    out = checkpoint_output((out / _per_query(total)).astype(v.dtype))
    return out, (q, k, v, out, checkpoint_name(top + jnp.log(total), ATTENTION_OUT))


def _ring_backward(axis, residuals, d_out):
    """d logits = weights · (d weights − Σ d out · out), one share of the keys at a time."""
    q, k, v, out, log_total = residuals
    turns = jax.lax.axis_size(axis)
    scale = q.shape[-1] ** -0.5
    inner = jnp.einsum("bnkh,bnkh->bkn", d_out.astype(jnp.float32), out.astype(jnp.float32))
    d_q, d_k, d_v = (jnp.zeros(a.shape, jnp.float32) for a in (q, k, v))
    keys, values = k, v
    for turn in range(turns):
        following = _rotate((keys, values), axis) if turn + 1 < turns else None
        weights = jnp.exp(_logits(q, keys) - log_total[..., None])
        d_weights = jnp.einsum("bnkh,bmkh->bknm", d_out, values, preferred_element_type=jnp.float32)
        d_logits = (weights * (d_weights - inner[..., None]) * scale).astype(q.dtype)
        d_q += jnp.einsum("bknm,bmkh->bnkh", d_logits, keys, preferred_element_type=jnp.float32)
        d_k += jnp.einsum("bknm,bnkh->bmkh", d_logits, q, preferred_element_type=jnp.float32)
        d_v += jnp.einsum(
            "bknm,bnkh->bmkh",
            weights.astype(d_out.dtype),
            d_out,
            preferred_element_type=jnp.float32,
        )
        d_k, d_v = _rotate((d_k, d_v), axis)  # back at their device after the last turn
        keys, values = following or (keys, values)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


_ring.defvjp(_ring_forward, _ring_backward)


def _logits(q, k):
    return (
        jnp.einsum("bnkh,bmkh->bknm", q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )


def _per_query(statistic):
    """[b, k, n] → [b, n, k, 1]."""
    return statistic.swapaxes(1, 2)[..., None]


def _rotate(arrays, axis):
    """Pass each device's arrays to the next one along the axis."""
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(arrays, axis, [(n, (n + 1) % size) for n in range(size)])

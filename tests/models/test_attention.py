"""Attention against the definition in float64: lengths, bias, scale, and samples with nothing to
attend to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.attention import attention
from pixart_jax.models.context import check_context_attention, context_parallel_attention


def draw(b=3, n=5, m=7, k=2, h=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(b, length, k, h)).astype(np.float32) for length in (n, m, m))


def definition(q, k, v, lengths=None, bias=None, scale=None):
    """Sample by sample, head by head, in float64."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        count = k.shape[1] if lengths is None else lengths[b]
        for head in range(q.shape[2]) if count else ():
            logits = (
                q[b, :, head].astype(np.float64)
                @ k[b, :count, head].T
                * (q.shape[-1] ** -0.5 if scale is None else scale)
            )
            if bias is not None:
                logits += np.broadcast_to(bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))[
                    b, head, :, :count
                ]
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, head] = weights / weights.sum(-1, keepdims=True) @ v[b, :count, head]
    return out


@pytest.mark.parametrize("lengths", [None, [7, 1, 4], [0, 7, 3]])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_attention_is_its_definition(lengths, biased, scale):
    q, k, v = draw()
    bias = np.random.default_rng(1).normal(size=(1, 2, 5, 7)).astype(np.float32) if biased else None
    lengths = None if lengths is None else np.array(lengths)
    ours = attention(q, k, v, lengths=lengths, bias=bias, scale=scale)
    np.testing.assert_allclose(ours, definition(q, k, v, lengths, bias, scale), atol=2e-6)


def test_length_zero_gives_zeros_and_finite_gradients():
    q, k, v = draw()
    lengths = jnp.array([0, 7, 0])
    out, gradient = jax.value_and_grad(lambda k: attention(q, k, v, lengths=lengths).sum())(
        jnp.asarray(k)
    )
    assert np.isfinite(out) and np.isfinite(gradient).all()
    assert not np.any(gradient[0]) and not np.any(attention(q, k, v, lengths=lengths)[0])


def test_softmax_is_fp32_under_bf16_inputs():
    """Many equal keys: a bf16 sum of weights would stop growing at 256 of them."""
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 4096, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=0.01)


def test_unknown_backend_is_named():
    q, k, v = draw()
    with pytest.raises(UserError, match="did you mean 'xla'"):
        attention(q, k, v, backend="xlla")


@pytest.mark.parametrize("how", ["all_gather", "ring", "replicated"])
def test_on_one_device_every_way_of_context_attention_is_plain_attention(how):
    q, k, v = draw(n=7)
    np.testing.assert_array_equal(
        context_parallel_attention(q, k, v, context_attention=how),
        attention(q, k, v).reshape(3, 7, -1),
    )


def test_unknown_context_attention_is_named():
    with pytest.raises(UserError, match="did you mean 'ring'"):
        check_context_attention("rign")

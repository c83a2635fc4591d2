"""Attention against its definition in float64, the choice of a backend, and splash (interpreted)
against dense attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.attention import (
    LANES,
    LARGEST_BLOCK,
    AttentionShape,
    attention,
    choose,
    dense_attention,
    platform,
    resolve_backend,
    splash_attention,
    splash_block,
)
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.ring import check_context_attention, context_parallel_attention
from pixart_jax.models.transformer import PixArtTransformer


def draw(b=3, n=5, m=7, k=2, h=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(b, length, k, h)).astype(np.float32) for length in (n, m, m))


def definition(q, k, v, lengths=None, bias=None, scale=None):
    """Sample by sample, head by head, in float64."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        count = k.shape[1] if lengths is None else lengths[b]
        for head in range(q.shape[2]) if count else ():
            logits = q[b, :, head].astype(np.float64) @ k[b, :count, head].T
            logits *= q.shape[-1] ** -0.5 if scale is None else scale
            if bias is not None:
                logits += bias[0, head, :, :count]
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
    attend = functools.partial(attention, lengths=jnp.array([0, 7, 0]))
    out, gradient = jax.value_and_grad(lambda k: attend(q, k, v).sum())(jnp.asarray(k))
    assert np.isfinite(out) and np.isfinite(gradient).all()
    assert not np.any(gradient[0]) and not np.any(attend(q, k, v)[0])


def test_softmax_is_fp32_under_bf16_inputs():
    """Many equal keys: a bf16 sum of weights would stop growing at 256 of them."""
    q, k = jnp.zeros((1, 1, 1, 8), jnp.bfloat16), jnp.zeros((1, 4096, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=0.01)


@pytest.mark.parametrize("how", ["all_gather", "ring", "replicated"])
def test_on_one_device_every_way_of_context_attention_is_plain_attention(how):
    q, k, v = draw(n=7)
    found = context_parallel_attention(q, k, v, context_attention=how)
    np.testing.assert_array_equal(found, attention(q, k, v).reshape(3, 7, -1))


def test_unknown_context_attention_is_named():
    with pytest.raises(UserError, match="did you mean 'ring'"):
        check_context_attention("rign")


# ---- the choice of a backend ----


def call(
    platform="gpu", queries=1024, keys=1024, head_dim=72, dtype="bfloat16", **given
) -> AttentionShape:
    return AttentionShape(platform, queries, keys, head_dim, jnp.dtype(dtype), **given)


@pytest.mark.parametrize(
    "chosen, of",
    [
        ("cudnn", call()),
        ("cudnn", call(keys=120, lengths=True)),
        ("cudnn", call(queries=64, keys=64, head_dim=32)),
        ("xla", call(dtype="float32")),
        ("xla", call(bias=True)),
        ("xla", call(head_dim=512)),
        ("xla", call(head_dim=12)),
        ("xla", call(keys=32)),
        ("splash", call("tpu")),
        ("splash", call("tpu", 256, 256)),
        ("splash", call("tpu", dtype="float32")),
        ("splash", call("tpu", 4096, 4096, 512)),
        ("xla", call("tpu", 4096, 120, lengths=True)),
        ("xla", call("tpu", 4096, 300, lengths=True)),
        ("xla", call("tpu", 64, 64)),
        ("xla", call("tpu", bias=True)),
        ("xla", call("cpu")),
    ],
)
def test_auto_chooses_by_platform_and_shape(chosen, of):
    assert choose(of) == chosen
    assert resolve_backend("auto", of) == resolve_backend(chosen, of) == chosen


@pytest.mark.parametrize(
    "name, of, says",
    [
        ("cudnn", call("cpu"), "CUDA GPU, and this program is for a CPU; 'auto' would take 'xla'"),
        ("splash", call("gpu"), "TPU, and this program is for a GPU; 'auto' would take 'cudnn'"),
        ("cudnn", call(dtype="float32"), "not in float32"),
        ("cudnn", call(head_dim=12), "not of 12"),
        ("cudnn", call(bias=True), "bias"),
        ("splash", call("tpu", dtype="float16"), "not in float16"),
        ("cudann", call(), "did you mean 'cudnn'"),
    ],
)
def test_a_backend_that_cannot_run_here_says_why(name, of, says):
    with pytest.raises(UserError) as error:
        resolve_backend(name, of)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_models_config_names_a_backend_and_its_parameters_are_made_anywhere():
    sizes = {"depth": 1, "width": 32, "heads": 2, "caption_width": 8, "text_tokens": 4}
    model = PixArtTransformer(TransformerConfig(**sizes, attention_backend="splash"))
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 4, 8)), jnp.ones(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    with pytest.raises(UserError, match="'splash' runs on a TPU"):
        jax.eval_shape(model.apply, params, *inputs)


def test_the_platform_is_that_of_the_mesh_and_else_of_this_process():
    assert platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((4,), ("data",), auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform() == "tpu"


# ---- splash, in Pallas's interpreter ----


def draw_with_gradient(b, n, m, k, h):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (b, size, k, h)) for key, size in zip(keys, (n, m, m, n))]


@pytest.mark.parametrize(
    "b, n, m, k, lengths",
    [
        (1, 256, 256, 2, None),  # the self-attention of 256 px
        (1, 140, 140, 1, None),  # padded without lengths
        (4, 200, 130, 1, [0, 1, 130, 77]),
        (1, 128, 1200, 1, [1111]),  # more blocks of keys than one: the other backward kernel
    ],
)
def test_splash_equals_xla_forward_and_in_gradients(b, n, m, k, lengths):
    q, keys, values, d_out = draw_with_gradient(b, n, m, k, 72)
    lengths = None if lengths is None else jnp.array(lengths)

    def run(attend, *given, **how):
        def both(d_out, *qkv):
            out, back = jax.vjp(lambda *qkv: attend(*qkv, lengths, *given, 72**-0.5, **how), *qkv)
            return out, back(d_out)

        return jax.jit(both)(d_out, q, keys, values)

    ours, our_gradients = run(splash_attention, interpret=True)
    theirs, their_gradients = run(dense_attention, None)
    np.testing.assert_allclose(ours, theirs, atol=3e-6)
    for one, other in zip(our_gradients, their_gradients, strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=1e-5 * float(np.abs(other).max()) + 1e-6)
    if lengths is not None and 0 in lengths:
        empty = int(np.argmin(lengths))
        assert not np.any(ours[empty]) and not any(np.any(g[empty]) for g in our_gradients)


@pytest.mark.parametrize(
    "tokens", [1, 120, 128, 256, 300, 1000, 1024, 1040, 2304, 4080, 4096, 4200, 16384]
)
def test_blocks_are_whole_lanes_and_waste_less_than_a_tenth_of_many_tokens(tokens):
    size = splash_block(tokens)
    padded = -(-tokens // size) * size
    assert size % LANES == 0 and size <= LARGEST_BLOCK
    assert padded - tokens < max(LANES, 0.1 * tokens)

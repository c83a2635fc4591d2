"""The backends of attention: which one is taken where, that splash (interpreted) is xla, on one
device and in a block under remat."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.attention import AttentionShape, backends, choose, dense, splash
from pixart_jax.models.transformer import PixArtTransformer, TransformerConfig


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
    assert (
        backends.unsupported_reason(chosen, of) is None
        and backends.resolve_backend("auto", of) == chosen
    )


@pytest.mark.parametrize(
    "name, of, says",
    [
        (
            "cudnn",
            call("cpu"),
            "runs on a CUDA GPU, and this program is for a CPU; 'auto' would take 'xla'",
        ),
        (
            "splash",
            call("gpu"),
            "runs on a TPU, and this program is for a GPU; 'auto' would take 'cudnn'",
        ),
        ("cudnn", call(dtype="float32"), "not in float32"),
        ("cudnn", call(head_dim=12), "not of 12"),
        ("cudnn", call(bias=True), "bias"),
        ("splash", call("tpu", dtype="float16"), "not in float16"),
        ("cudann", call(), "did you mean 'cudnn'"),
    ],
)
def test_a_backend_that_cannot_run_here_says_why(name, of, says):
    with pytest.raises(UserError) as fault:
        backends.resolve_backend(name, of)
    assert says in str(fault.value) and "\n" not in str(fault.value)


def test_the_models_config_names_a_backend_and_its_parameters_are_made_anywhere():
    model = PixArtTransformer(
        TransformerConfig(
            depth=1, width=32, heads=2, caption_width=8, text_tokens=4, attention_backend="splash"
        )
    )
    inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1), jnp.zeros((1, 4, 8)), jnp.ones(1, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    with pytest.raises(UserError, match="'splash' runs on a TPU"):
        jax.eval_shape(model.apply, params, *inputs)


def test_the_platform_is_that_of_the_mesh_and_else_of_this_process():
    assert backends.platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh(
        (4,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        assert backends.platform() == "tpu"


# ---- splash, in Pallas's interpreter ----


def draw(b, n, m, k, h, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
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
    q, keys, values, d_out = draw(b, n, m, k, 72)
    lengths = None if lengths is None else jnp.array(lengths)

    def run(attend, *given, **how):
        def both(q, keys, values, d_out):
            out, back = jax.vjp(
                lambda *qkv: attend(*qkv, lengths, *given, 72**-0.5, **how), q, keys, values
            )
            return out, back(d_out)

        return jax.jit(both)(q, keys, values, d_out)

    (ours, our_gradients), (theirs, their_gradients) = (
        run(splash.attend, interpret=True),
        run(dense.attend, None),
    )
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
    size = splash.block(tokens)
    padded = -(-tokens // size) * size
    assert size % splash.LANES == 0 and size <= splash.LARGEST_BLOCK
    assert padded - tokens < max(splash.LANES, 0.1 * tokens)

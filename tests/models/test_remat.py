"""Remat policies: what they keep changes, what they compute does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxprs
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.remat import HOST, NAMES, check_platform
from pixart_jax.models.transformer import PixArtTransformer, TransformerConfig
from pixart_jax.planning.matmul_cost import matmul_cost

pytestmark = pytest.mark.usefixtures("optimized")
CONFIG = TransformerConfig(
    depth=4, width=64, heads=4, caption_width=16, text_tokens=8, sample_size=16
)


def gradient(name: str):
    """(the traced gradient of a loss in the parameters, its arguments)."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = (
        jax.random.normal(keys[0], (4, 16, 16, 4)),
        jnp.arange(4.0),
        jax.random.normal(keys[1], (4, 8, 16)),
        jnp.full(4, 8),
    )
    module = PixArtTransformer(CONFIG, remat=name)
    params = jax.tree.map(
        lambda x: x + 0.01, jax.jit(PixArtTransformer(CONFIG).init)(keys[2], *inputs)["params"]
    )

    def loss(params):
        return jnp.square(module.apply({"params": params}, *inputs)).mean()

    return jax.jit(jax.grad(loss)).trace(params), params


def test_only_none_keeps_what_attention_makes_for_each_pair_of_tokens():
    """Logits and probabilities [.., n, m] of the 64 image tokens over themselves or the 8 text
    tokens, stacked over the blocks."""
    pairs = {(64, 64), (64, 8)}

    def kept(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield from (v.aval.shape for v in jaxprs.stacked(equation))
            for inner in jaxprs.within(equation):
                yield from kept(inner)

    for name in NAMES:
        found = any(
            shape[-2:] in pairs and len(shape) == 5 for shape in kept(gradient(name)[0].jaxpr.jaxpr)
        )
        assert found == (name == "none"), name


def test_dots_attention_keeps_what_dots_does_and_computes_no_attention_again():
    flops = {name: matmul_cost(gradient(name)[0].jaxpr.jaxpr).flops for name in NAMES}
    assert (
        flops["none"]
        < flops["dots_attention"]
        < flops["dots"]
        < flops["attention_out"]
        < flops["full"]
    )


def test_offload_moves_what_attention_out_keeps_to_the_host():
    """In the program for a TPU; on a CPU, JAX leaves the move out."""
    programs = {
        name: gradient(name)[0].lower(lowering_platforms=("tpu",)).as_text()
        for name in ("offload", "attention_out")
    }
    assert programs["offload"].count(HOST) == 3  # the block's input and both attentions
    assert HOST not in programs["attention_out"]


def test_offload_on_a_cpu_is_one_clear_line():
    check_platform("offload", "tpu")
    check_platform("full", "cpu")
    with pytest.raises(UserError, match="remat offload: a CPU has no other memory"):
        check_platform("offload", "cpu")

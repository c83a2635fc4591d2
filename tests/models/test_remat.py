"""Remat policies: what they keep changes, what they compute does not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxprs
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.remat import HOST, NAMES, check_platform
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.planning.matmul_cost import matmul_cost
from tests.models.reference import transformer_shapes

pytestmark = pytest.mark.usefixtures("optimized")
SIZES = {"depth": 4, "width": 64, "heads": 4, "caption_width": 16, "text_tokens": 8}
CONFIG = TransformerConfig(**SIZES, sample_size=16)


def gradient(name: str):
    """The traced gradient of a loss in the parameters."""
    keys = jax.random.split(jax.random.key(0), 2)
    latents, states = jax.random.normal(keys[0], (4, 16, 16, 4)), jnp.ones((4, 8, 16))
    inputs = latents, jnp.arange(4.0), states, jnp.full(4, 8)
    module, params = PixArtTransformer(CONFIG, remat=name), transformer_shapes(CONFIG)

    def loss(params):
        return jnp.square(module.apply({"params": params}, *inputs)).mean()

    return jax.jit(jax.grad(loss)).trace(params)


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
        shapes = kept(gradient(name).jaxpr.jaxpr)
        found = any(shape[-2:] in pairs and len(shape) == 5 for shape in shapes)
        assert found == (name == "none"), name


def test_dots_attention_keeps_what_dots_does_and_computes_no_attention_again():
    names = ("none", "dots_attention", "dots", "attention_out", "full")
    flops = [matmul_cost(gradient(name).jaxpr.jaxpr).flops for name in names]
    assert flops == sorted(set(flops))


def test_offload_moves_what_attention_out_keeps_to_the_host():
    """In the program for a TPU; on a CPU, JAX leaves the move out."""
    programs = {
        name: gradient(name).lower(lowering_platforms=("tpu",)).as_text()
        for name in ("offload", "attention_out")
    }
    assert programs["offload"].count(HOST) == 3  # the block's input and both attentions
    assert HOST not in programs["attention_out"]


def test_offload_on_a_cpu_is_one_clear_line():
    check_platform("offload", "tpu")
    check_platform("full", "cpu")
    with pytest.raises(UserError, match="remat offload: a CPU has no other memory"):
        check_platform("offload", "cpu")

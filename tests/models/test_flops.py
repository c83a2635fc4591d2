"""Counted arithmetic is that of the models' own programs."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import jaxprs
import pytest

from pixart_jax.models.configs import DiTConfig, TransformerConfig
from pixart_jax.models.controlnet import ControlledTransformer, config_of
from pixart_jax.models.dit import DiT
from pixart_jax.models.flops import forward_flops, train_flops
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.parallel.rules import unboxed
from pixart_jax.weights import component

SIZES = {"depth": 3, "width": 48, "heads": 4, "sample_size": 8}
PIXART = TransformerConfig(**SIZES, caption_width=40, text_tokens=12)
MODELS = {
    "pixart": PIXART,
    "sizes": dataclasses.replace(PIXART, size_conditions=True, mlp_ratio=3.0, patch_size=4),
    "compressed": dataclasses.replace(PIXART, kv_compression=2, kv_compression_layers=(0, 1, 2)),
    "dit": DiTConfig(**SIZES, num_classes=7),
}


def call(config, height=64, width=96, text=12):
    """(function of parameters, their shapes): one evaluation for one image."""
    latents, one = jnp.zeros((1, height // 8, width // 8, 4)), jnp.ones((1,))
    if isinstance(config, DiTConfig):
        module, inputs = DiT(config), (latents, one, jnp.zeros((1,), int))
    else:
        states = jnp.zeros((1, text, config.caption_width))
        module = PixArtTransformer(config)
        inputs = (latents, one, states, jnp.full((1,), text), jnp.ones((1, 2)), one)
    params = jax.eval_shape(lambda key: unboxed(module.init(key, *inputs)), jax.random.key(0))
    return lambda params: module.apply(params, *inputs), params


def products(jaxpr) -> int:
    """2·m·n·k of every dot_general, those in a scan times its length; of a cond the cheapest
    branch."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in left)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * summed
        elif inner := [products(part) for part in jaxprs.within(eqn)]:
            once = min(inner) if eqn.primitive.name == "cond" else sum(inner)
            total += once * eqn.params.get("length", 1)
    return total


@pytest.mark.parametrize("name", MODELS)
def test_counted_flops_are_those_of_every_matrix_product_of_the_program(name):
    function, params = call(MODELS[name])
    counted = products(jax.make_jaxpr(function)(params).jaxpr)
    assert forward_flops(MODELS[name], 64, 96, 12) == counted


def test_a_controlnets_copies_are_counted():
    config, latents = PIXART, jnp.zeros((1, 8, 12, 4))
    parts = component.Transformer(config, {}), component.ControlNet(config_of(config), {})
    base, control = (unboxed(part.param_shapes(part.config)) for part in parts)
    module = ControlledTransformer(config, units=2)
    text = jnp.zeros((1, 12, config.caption_width)), jnp.full((1,), 12)
    given = latents, 1.0, latents, jnp.ones((1,)), *text, None, None

    def run(params):
        return module.apply({"params": params}, *given, method="controlled")

    counted = products(jax.make_jaxpr(run)({**base, "control": control}).jaxpr)
    assert forward_flops(config, 64, 96, 12, copies=2) == counted
    # the base's backward pass gives no gradient of its weights
    assert train_flops(config, 64, 96, 12, frozen=True, copies=2) == 3 * counted - forward_flops(
        config, 64, 96, 12
    )


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_one_layer_counts_as_the_compiler_counts_it(name):
    """XLA adds pointwise work to it; a loop of one turn is no loop to it."""
    config = dataclasses.replace(MODELS[name], depth=1, width=256)
    function, params = call(config)
    counted = jax.jit(function).lower(params).compile().cost_analysis()
    assert 1.0 <= counted["flops"] / forward_flops(config, 64, 96, 12) < 1.1


@pytest.mark.parametrize(("side", "tera"), [(256, 0.298), (512, 1.236), (1024, 6.51)])
def test_the_known_figures_of_xl2(side, tera):
    flops = forward_flops(TransformerConfig.preset("XL/2"), side, side, 120)
    assert flops == pytest.approx(tera * 1e12, rel=3e-3)


def test_a_train_step_is_three_forward_passes():
    assert train_flops(PIXART, 64, 64, 12) == 3 * forward_flops(PIXART, 64, 64, 12)

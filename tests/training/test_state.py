"""Where the state lies: said by shapes alone, for the full-size model on eight devices that are not
here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from pixart_jax.config import OptimizerConfig
from pixart_jax.models.configs import DiTConfig, T5Config, TransformerConfig, VAEConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.t5 import T5Encoder
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.models.vae import AutoencoderKL
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import AXES
from pixart_jax.training.memory import bytes_per_device
from pixart_jax.training.optimizer import make_optimizer
from pixart_jax.training.state import abstract_state
from tests.parallel.replicated import large_replicated

LATENTS = jnp.zeros((1, 2, 2, 4))
ONE = jnp.ones((1,))
MODELS = {
    "xl2": (
        PixArtTransformer(TransformerConfig.preset("XL/2", size_conditions=True)),
        (LATENTS, ONE, jnp.zeros((1, 1, 4096)), ONE, jnp.ones((1, 2)), ONE),
    ),
    "dit": (DiT(DiTConfig.preset("XL/2")), (LATENTS, ONE, jnp.zeros((1,), int))),
    "t5-xxl": (T5Encoder(T5Config()), (jnp.zeros((1, 1), int), jnp.ones((1,), int))),
    "sd-vae": (AutoencoderKL(VAEConfig()), (jnp.zeros((1, 8, 8, 3)),)),
}


def abstract(name: str, optimizer: str, **sizes):
    module, arguments = MODELS[name]
    boxed = jax.eval_shape(module.init, jax.random.key(0), *arguments)["params"]
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    mesh = jax.sharding.AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 4)
    config = dataclasses.replace(OptimizerConfig(), name=optimizer)
    return abstract_state(boxed, make_optimizer(config, 10, 8, rules.logical_names(boxed)), mesh)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("optimizer", ["adamw", "came"])
def test_no_array_over_a_megabyte_is_whole_on_every_device(name, optimizer):
    state = abstract(name, optimizer, fsdp=8)
    assert large_replicated(state) == []
    whole = bytes_per_device(abstract(name, optimizer))
    assert bytes_per_device(state) < whole / 8 * 1.04  # what small arrays cost beyond an eighth


def test_the_optimizer_keeps_its_moments_where_the_parameters_lie():
    state = abstract("xl2", "adamw", fsdp=4, tensor=2)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    kernel = flat["params/blocks/mlp/fc1/kernel"].sharding
    assert kernel.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    kept = [leaf.sharding for path, leaf in flat.items() if path.endswith("blocks/mlp/fc1/kernel")]
    assert len(kept) == 4 and set(kept) == {kernel}  # master, two moments, average

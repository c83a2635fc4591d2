"""The MLP's last product times its gate: the gradient without the product is the plain one, and a block under remat takes that way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from pixart_jax.models.dit import DiT, DiTConfig
from pixart_jax.models.gated_dense import RECOMPUTING, SAMPLES, gated_dense, pays
from pixart_jax.models.remat import NAMES
from pixart_jax.models.transformer import PixArtTransformer, TransformerConfig
from pixart_jax.parallel import rules
from pixart_jax.planning.arithmetic import products

SIZES = {"depth": 2, "width": 24, "heads": 2, "in_channels": 4}


def plain(x, kernel, bias, gate):
    return gate[:, None] * (jnp.dot(x, kernel) + bias)


@pytest.mark.parametrize(("dtype", "within"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("samples", [1, 3])
def test_value_and_gradients_are_the_plain_ones(samples, dtype, within):
    rng = np.random.default_rng(0)
    shapes = ((samples, 20, 12), (12, 8), (8,), (samples, 8))
    operands = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    dy = jnp.asarray(rng.standard_normal((samples, 20, 8)), dtype)
    exact = [a.astype(jnp.float32) for a in operands]
    want, pull = jax.vjp(plain, *exact)
    got, gated_pull = jax.vjp(gated_dense, *operands)
    names = ("value", "x", "kernel", "bias", "gate")
    pairs = zip(names, (want, *pull(dy.astype(jnp.float32))), (got, *gated_pull(dy)), strict=True)
    for name, a, b in pairs:
        assert b.dtype == dtype, name
        assert np.abs(np.asarray(b, np.float32) - a).max() <= within * np.abs(a).max(), name


def model_and_loss(kind: str, remat: str):
    latents, times = jnp.linspace(-1, 1, 2 * 8 * 8 * 4).reshape(2, 8, 8, 4), jnp.array([3.0, 700.0])
    if kind == "pixart":
        model = PixArtTransformer(TransformerConfig(**SIZES, caption_width=10, text_tokens=5), remat=remat)
        given = (latents, times, jnp.linspace(-1, 1, 100).reshape(2, 5, 10), jnp.array([5, 3]))
    else:
        model = DiT(DiTConfig(**SIZES, num_classes=3), remat=remat)
        given = (latents, times, jnp.array([0, 2]))
    params = rules.unboxed(jax.eval_shape(model.init, jax.random.key(0), *given))["params"]
    leaves, tree = jax.tree.flatten(params)  # random, for what starts at zero would hide its factors
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(tree, [0.2 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    return params, lambda params: jnp.square(model.apply({"params": params}, *given)).mean()


@pytest.mark.parametrize("kind", ["pixart", "dit"])
def test_a_model_under_full_remat_has_the_gradient_of_one_without_and_computes_no_last_product_again(kind):
    params, without = model_and_loss(kind, "none")
    _, full = model_and_loss(kind, "full")
    want, got = jax.jit(jax.grad(without))(params), jax.jit(jax.grad(full))(params)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1e-2), path

    def step(loss):
        return products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr).flops

    # The forward pass again, all but fc2: 2 samples, 16 patches, width 24, MLP 96, twice for multiply and add, 2 blocks.
    forward = products(jax.make_jaxpr(without)(params).jaxpr).flops
    again = step(full) - step(without)
    assert again <= forward - 2 * 2 * 2 * 16 * 24 * 96


def test_it_pays_where_the_output_is_not_kept_on_one_cpu_device_for_few_samples():
    assert {name for name in NAMES if pays(name, 1)} == set(RECOMPUTING)
    assert pays("full", SAMPLES)
    assert not pays("full", SAMPLES + 1)
    for devices in (1, 2):
        with jax.sharding.use_abstract_mesh(AbstractMesh((devices,), ("data",))):
            assert pays("full", 1) == (devices == 1)

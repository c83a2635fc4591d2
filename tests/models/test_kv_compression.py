"""PixArt-Σ's key and value compression, against PyTorch with the same weights, and what it promises
by itself."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import torch

from pixart_jax.errors import UserError
from pixart_jax.models import remat
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.layers import Compression, compress
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.weights import transformer as names
from pixart_jax.weights.table import flatten
from tests.models.official_reference import OfficialPixArt, run_official
from tests.models.reference import (
    inputs,
    randomise,
    read_state_dict,
    relative_error,
    transformer_shapes,
)

SIZES = dict(depth=4, width=24, heads=2, caption_width=20, text_tokens=9, sample_size=8)


def sigma(**overrides) -> TransformerConfig:
    compressed = {"kv_compression": 2, "kv_compression_layers": (2, 3)}
    return TransformerConfig(**{**SIZES, **compressed, **overrides})


def pair(config: TransformerConfig) -> tuple[OfficialPixArt, dict]:
    """(the reference, our parameters of the same values)."""
    theirs = randomise(OfficialPixArt(config))
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    table, shapes = names.official(config), transformer_shapes(config)
    return theirs, read_state_dict(table, shapes, state, ignore=names.OFFICIAL_IGNORE)


NONE = {"kv_compression": 1, "kv_compression_layers": ()}
ALL = {"kv_compression": 4, "kv_compression_layers": (0, 1, 2, 3)}
CASES = {
    "the last layers, square": (sigma(), (8, 8), [7, 7]),
    "not square, ragged texts": (sigma(), (8, 12), [1, 7, 4]),
    "some layers": (sigma(kv_compression_layers=(0, 2)), (12, 8), [5, 2]),
    "all layers, ratio 4": (sigma(**ALL), (16, 8), [3, 6]),
    "a grid that the ratio does not divide": (sigma(kv_compression=3), (10, 14), [3, 6]),
    "with query and key norm": (sigma(qk_norm=True), (8, 12), [6, 3]),
    "with size conditions": (sigma(size_conditions=True), (8, 12), [6, 3]),
    "none, query and key norm": (sigma(**NONE, qk_norm=True), (8, 12), [6, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_reference(case):
    config, (height, width), lengths = CASES[case]
    theirs, params = pair(config)
    args = inputs(config, height, width, lengths)
    ours = jax.jit(PixArtTransformer(config).apply)({"params": params}, **args)
    assert relative_error(ours, run_official(theirs, **args)) <= 1e-5


@pytest.mark.slow
def test_gradients_equal_the_references_under_every_remat_policy():
    config = sigma(qk_norm=True)
    theirs, params = pair(config)
    args = inputs(config, 8, 12, [3, 5])
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    tensors = (torch.tensor(args[name]) for name in ("timesteps", "text_states"))
    latents = torch.tensor(args["latents"]).permute(0, 3, 1, 2)
    theirs(latents, *tensors, mask).square().mean().backward()
    state = {key: value.grad.numpy() for key, value in theirs.named_parameters()}
    shapes = transformer_shapes(config)
    shapes.pop("null_caption")  # a buffer
    want = flatten(read_state_dict(names.official(config), shapes, state))
    largest = max(np.abs(value).max() for value in want.values())
    assert np.abs(want["kv_compression/kernel"]).max() > 1e-3 * largest, "else it does not matter"

    def loss(params, policy):
        module = PixArtTransformer(config, remat=policy)
        return jnp.square(module.apply({"params": params}, **args)).mean()

    for policy in remat.NAMES:
        got = flatten(jax.jit(jax.grad(loss), static_argnums=1)(params, policy))
        for path, value in want.items():
            bound = 1e-4 * max(np.abs(value).max(), 1e-2 * largest)
            assert np.abs(got[path] - value).max() <= bound, (policy, path)


def test_it_starts_as_the_normalised_mean_of_each_patch_group():
    config = sigma()
    args = inputs(config, 2, 2, [2])  # one patch: parameters do not depend on the grid
    boxed = jax.jit(PixArtTransformer(config).init)(jax.random.key(0), **args)
    params = nn.unbox(boxed)["params"]["kv_compression"]
    leaves = (params[name][0] for name in ("kernel", "bias", "norm_scale", "norm_bias"))
    by = Compression(jnp.bool_(True), *leaves)
    tokens = np.random.default_rng(0).normal(size=(2, 24, 24)).astype(np.float32)
    mean = tokens.reshape(2, 2, 2, 3, 2, 24).mean((2, 4)).reshape(2, 6, 24)
    want = torch.nn.functional.layer_norm(torch.tensor(mean), (24,)).numpy()
    assert relative_error(compress(tokens, (4, 6), by), want) <= 1e-5


def primitives(jaxpr) -> list[str]:
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        for inner in jaxprs.within(equation):
            found += primitives(inner)
    return found


def test_layers_without_it_and_models_without_it_compute_nothing_of_it():
    def program(config):
        shapes, args = {"params": transformer_shapes(config)}, inputs(config, 8, 8, [3])
        return primitives(jax.make_jaxpr(PixArtTransformer(config).apply)(shapes, **args).jaxpr)

    plain = program(sigma(**NONE))
    compressed = program(sigma())
    assert plain.count("scan") == compressed.count("scan") == 1, "one loop over all blocks"
    # a layer computes one of the two ways
    assert "cond" not in plain and compressed.count("cond") == 1
    assert "kv_compression" not in transformer_shapes(sigma(**NONE))


def test_parameters_are_those_of_the_compressed_layers_alone():
    counts = []
    for more in ({}, {"kv_compression": 2, "kv_compression_layers": tuple(range(14, 28))}):
        shapes = transformer_shapes(TransformerConfig.preset("XL/2", text_tokens=300, **more))
        counts.append(sum(leaf.size for leaf in jax.tree.leaves(shapes)))
    assert counts[1] - counts[0] == 14 * 1152 * (2 * 2 + 1 + 2)


def test_config_survives_its_json():
    config = sigma(position_scale=0.5)
    data = names.config_to_json(config)
    assert data["kv_compression"] == 2 and data["kv_compression_layers"] == [2, 3]
    back = names.config_from_json(data)
    assert back == config and hash(back) == hash(config)
    assert "kv_compression" not in names.config_to_json(TransformerConfig(**SIZES))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({**NONE, "kv_compression": 0}, "kv_compression = 0: must be at least 1"),
        ({"kv_compression_layers": ()}, "must name at least one layer with kv_compression = 2"),
        ({"kv_compression": 1}, r"kv_compression_layers = \(2, 3\): must name no layer"),
        ({"kv_compression_layers": (3, 4)}, r"\(3, 4\): must be layers of 0 … 3"),
        ({"kv_compression_layers": (3, 2)}, "ascending"),
        ({"kv_compression_layers": (2, 2)}, "each once"),
        ({"kv_compression_layers": ("2",)}, "must be layers of 0 … 3"),
    ],
)
def test_a_bad_option_is_named(fields, message):
    with pytest.raises(UserError, match=message) as error:
        sigma(**fields)
    assert "\n" not in str(error.value)


def test_a_grid_smaller_than_the_ratio_is_named():
    config = sigma(kv_compression=4)
    params = transformer_shapes(config)
    says = "3 × 5 patches is too small for kv_compression = 4: latents of at least 8 × 8 would do"
    with pytest.raises(UserError, match=says):
        apply = PixArtTransformer(config).apply
        jax.eval_shape(apply, {"params": params}, **inputs(config, 6, 10, [3]))

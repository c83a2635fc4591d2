"""The PixArt transformer against diffusers' with the same weights, and what it promises by
itself."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

from benchmarks.parity_rows import official as official_names
from pixart_jax.errors import UserError
from pixart_jax.models import remat
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.weights import transformer as names
from pixart_jax.weights.component import Transformer
from pixart_jax.weights.table import flatten, write
from tests.models import reference
from tests.models.reference import (
    diffusers_pair,
    inputs,
    randomise,
    read_state_dict,
    relative_error,
    run_diffusers,
    transformer_shapes,
)

TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3}
TINY |= {"caption_channels": 20, "sample_size": 8}
ODD = {"num_attention_heads": 3, "attention_head_dim": 28, "num_layers": 2}
ODD |= {"caption_channels": 17, "sample_size": 20, "interpolation_scale": 2}
OURS = {"depth": 3, "width": 24, "heads": 2, "caption_width": 20, "text_tokens": 9}


def tiny(**overrides) -> TransformerConfig:
    return TransformerConfig(**{**OURS, "sample_size": 8, **overrides})


def random_params(config: TransformerConfig) -> dict:
    return reference.random_params(Transformer, config)


def forward(config: TransformerConfig, params: dict, args: dict, **options):
    return jax.jit(PixArtTransformer(config, **options).apply)({"params": params}, **args)


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


PATCH_4 = {"patch_size": 4, "in_channels": 3, "out_channels": 5}
OPTIONS = ({}, {"kv_compression": 2, "kv_compression_layers": (1, 2)})
CASES = {
    "square": (TINY, (8, 8), [7, 7]),
    "non-square latents, ragged texts": (TINY, (6, 10), [1, 7, 4]),
    "odd grid, odd widths, scaled positions": (ODD, (10, 6), [5, 2]),
    "patch 4, own channels": ({**TINY, **PATCH_4}, (8, 12), [3, 6]),
    "the 900M model's 42 blocks": ({**TINY, "num_layers": 42}, (4, 6), [3]),
    "multi-scale": ({**TINY, "use_additional_conditions": True}, (4, 14), [6, 3]),
    "multi-scale, odd": ({**ODD, "use_additional_conditions": True}, (14, 10), [1, 12, 5]),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_diffusers(case):
    fields, (height, width), lengths = CASES[case]
    theirs, config, params = diffusers_pair(**fields)
    args = inputs(config, height, width, lengths)
    ours = forward(config, params, args)
    assert relative_error(ours, run_diffusers(theirs, **args)) <= 1e-5


def test_padding_after_a_text_changes_nothing():
    config = tiny()
    params, args = random_params(config), inputs(config, 8, 8, [3, 5])
    apply = jax.jit(PixArtTransformer(config).apply)
    short = apply({"params": params}, **args)
    states = np.pad(args["text_states"], ((0, 0), (0, 4), (0, 0)), constant_values=50.0)
    padded = apply({"params": params}, **{**args, "text_states": states})
    assert relative_error(padded, short) <= 1e-6


def loss(params: dict, config: TransformerConfig, policy: str, args: dict) -> jax.Array:
    module = PixArtTransformer(config, remat=policy)
    return jnp.square(module.apply({"params": params}, **args)).mean()


gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))


def test_text_of_length_zero_gives_numbers_and_finite_gradients():
    config = tiny()
    params, args = random_params(config), inputs(config, 8, 8, [3, 5])
    args["text_lengths"] = np.array([0, 0], np.int32)
    value, gradients = gradient(params, config, "full", args)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("options", OPTIONS)
def test_text_encoded_once_gives_the_same_as_the_whole_model(options):
    config = tiny(size_conditions=True, **options)
    module, params = PixArtTransformer(config), {"params": random_params(config)}
    args = inputs(config, 6, 8, [2, 5])
    apply = jax.jit(module.apply, static_argnames="method")
    text = apply(params, args["text_states"], args["text_lengths"], method="encode_text")
    assert text.keys.shape == (3, 2, 5, 2, 12)
    times = np.array([999.0, 420.5, 3.0], np.float32)
    sizes = args["size"], args["aspect_ratio"]
    conditioning = apply(params, times, *sizes, method="encode_times")
    assert conditioning.vector.shape == (3, 2, 24)
    assert conditioning.modulation.shape == (3, 2, 6, 24)
    for n, t in enumerate(times):
        at_t = jax.tree.map(lambda a, n=n: np.asarray(a)[n], conditioning)
        split, cached = apply(params, args["latents"], at_t, text, method="denoise")
        whole = apply(params, **{**args, "timesteps": np.full(2, t, np.float32)})
        assert not cached and relative_error(split, whole) <= 1e-6


@pytest.mark.parametrize("policy", [name for name in remat.NAMES if name != "none"])
def test_gradients_do_not_depend_on_remat(policy):
    config = tiny()
    params, args = random_params(config), inputs(config, 8, 8, [3, 5])

    kept, again = (flatten(gradient(params, config, name, args)[1]) for name in ("none", policy))
    largest = max(np.abs(value).max() for value in kept.values())
    # the gradient of a key's bias is zero but for rounding: the largest of all is the measure there
    for path, value in kept.items():
        difference = np.abs(again[path] - value).max()
        assert difference <= 1e-5 * max(np.abs(value).max(), 1e-3 * largest), path


def saved_bytes(policy: str) -> int:
    """Bytes of the loop's stacked residuals in the forward half of a gradient."""
    config = tiny(depth=5)
    params, args = transformer_shapes(config), inputs(config, 8, 8, [3, 5])
    traced = jax.make_jaxpr(jax.grad(lambda params: loss(params, config, policy, args)))(params)
    scans = [equation for equation in traced.jaxpr.eqns if equation.primitive.name == "scan"]
    forward = scans[0]
    return sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in jaxprs.stacked(forward))


def test_remat_policies_really_apply():
    sizes = {name: saved_bytes(name) for name in remat.NAMES}
    assert sizes["full"] < sizes["attention_out"] < sizes["dots"] < sizes["none"], sizes
    config, (n, d) = tiny(depth=5), (16, 24)
    blocks_inputs = config.depth * 2 * n * d * 4
    assert sizes["full"] <= blocks_inputs + config.depth * 4, (
        "full keeps the blocks' inputs and nothing more"
    )
    assert sizes["attention_out"] <= sizes["full"] + 2 * blocks_inputs, (
        "attention_out keeps one array more for each attention"
    )


def test_parameter_counts_are_the_published_ones():
    for conditions, published in ((False, 610_856_096), (True, 611_349_152)):
        shapes = transformer_shapes(TransformerConfig.preset("XL/2", size_conditions=conditions))
        null = shapes.pop("null_caption")
        assert null.shape == (120, 4096)
        assert count(shapes) == published
        assert count(shapes["blocks"]) == 28 * 21_255_552
        assert count(shapes["t_block"]) == 7_969_536
        if conditions:
            assert count(shapes["size_embedder"]) == count(shapes["ratio_embedder"]) == 246_528


def test_init_follows_the_published_distributions():
    sizes = {"width": 96, "heads": 4, "depth": 2, "caption_width": 64, "text_tokens": 120}
    config = tiny(**sizes, size_conditions=True)
    args = inputs(config, 4, 4, [2])
    boxed = jax.jit(PixArtTransformer(config).init)(jax.random.key(0), **args)
    params = flatten(nn.unbox(boxed)["params"])
    d = config.width
    for path, value in params.items():
        if path.endswith("bias") or path in ("final/kernel", "blocks/cross_attn/out/kernel"):
            assert not np.any(value), path
    uniform = {  # published matrix's (fan in, fan out): q, k, v are drawn as one
        **dict.fromkeys([f"blocks/attn/{name}" for name in "qkv"], (d, 3 * d)),
        "blocks/attn/out": (d, d),
        "blocks/cross_attn/q": (d, d),
        "blocks/cross_attn/k": (d, 2 * d),
        "blocks/cross_attn/v": (d, 2 * d),
        "blocks/mlp/fc1": (d, 4 * d),
        "blocks/mlp/fc2": (4 * d, d),
        "patch_embedder": (16, d),
    }
    for path, fans in uniform.items():
        bound, value = math.sqrt(6 / sum(fans)), params[f"{path}/kernel"]
        assert np.abs(value).max() <= bound, path
        assert np.std(value) == pytest.approx(bound / math.sqrt(3), rel=0.05), path
    normal = {"t_block/kernel": (0.02, 0.05), "blocks/table": (d**-0.5, 0.1)}
    normal |= {"final_table": (d**-0.5, 0.2), "null_caption": (config.caption_width**-0.5, 0.05)}
    for path in ("timestep_embedder", "size_embedder", "ratio_embedder", "caption_projection"):
        normal |= {f"{path}/{layer}/kernel": (0.02, 0.06) for layer in ("fc1", "fc2")}
    for path, (std, rel) in normal.items():
        assert np.std(params[path]) == pytest.approx(std, rel=rel), path
    first, second = params["blocks/attn/q/kernel"]
    assert not np.array_equal(first, second), "each block is drawn anew"


@pytest.mark.parametrize("options", OPTIONS)
def test_bf16_compute_keeps_fp32_parameters_and_stays_near_fp32(options):
    config = tiny(width=48, **options)
    params, args = random_params(config), inputs(config, 8, 8, [3, 5])
    fresh = transformer_shapes(config, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(fresh))
    exact = forward(config, params, args)
    rounded = forward(config, params, args, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, exact) <= 0.05


def test_timesteps_and_sizes_are_not_rounded_to_bf16():
    config = tiny(size_conditions=True)
    params, module = random_params(config), PixArtTransformer(config, jnp.bfloat16)
    apply = jax.jit(module.apply, static_argnames="method")

    def condition(time, width):
        given = np.float32([time]), np.float32([[1024.0, width]]), np.ones(1, np.float32)
        return apply({"params": params}, *given, method="encode_times")[0]

    for time, width in ((901.0, 1024.0), (900.0, 1025.0)):  # bfloat16 has neither number
        assert not np.array_equal(condition(900.0, 1024.0), condition(time, width))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_result_does_not_depend_on_the_batch_it_ran_in(options):
    config = tiny(**options)
    params, args = random_params(config), inputs(config, 8, 8, [3, 5, 5])
    apply = jax.jit(PixArtTransformer(config).apply)
    whole = apply({"params": params}, **args)
    for i in range(3):
        alone = apply({"params": params}, **{k: v[i : i + 1] for k, v in args.items()})
        assert relative_error(alone[0], whole[i]) <= 1e-5


@pytest.mark.parametrize("conditions", [False, True], ids=["plain", "multi-scale"])
def test_official_and_diffusers_files_read_to_equal_parameters_and_write_back(conditions):
    theirs, config, params = diffusers_pair(**{**TINY, "use_additional_conditions": conditions})
    state = dict(theirs.state_dict())
    official = official_names.transformer(dict(state), config.depth)
    official["y_embedder.y_embedding"] = torch.randn(9, 20)
    official["pos_embed"] = theirs.pos_embed.pos_embed

    shapes = {key: tuple(value.shape) for key, value in official.items()}
    found = names.config_from_official(shapes, pos_embed=official["pos_embed"].numpy(), heads=2)
    assert found == dataclasses.replace(config, text_tokens=9)
    read = read_state_dict(
        names.OFFICIAL, transformer_shapes(found), official, ignore=names.OFFICIAL_IGNORE
    )
    np.testing.assert_array_equal(read.pop("null_caption"), official["y_embedder.y_embedding"])
    assert flatten(read).keys() == flatten(params).keys()
    jax.tree.map(np.testing.assert_array_equal, read, params)

    for table, original in ((names.DIFFUSERS, state), (names.OFFICIAL, official)):
        written = write(table, params)
        assert written.keys() == set(original) - {"pos_embed", "y_embedder.y_embedding"}
        for key, value in written.items():
            np.testing.assert_array_equal(value, original[key])


def test_position_scale_is_read_from_an_official_table():
    for scale in (0.5, 1.0, 2.0):
        fields = {**TINY, "cross_attention_dim": 24, "interpolation_scale": scale}
        model = PixArtTransformer2DModel(**fields)
        assert names.position_scale_of(model.pos_embed.pos_embed.numpy()) == scale


@pytest.mark.parametrize("sample_size", [32, 64, 128])
def test_fields_that_a_released_config_leaves_out_mean_what_diffusers_takes_them_for(sample_size):
    fields = {**TINY, "cross_attention_dim": 24, "sample_size": sample_size}
    theirs, ours = PixArtTransformer2DModel(**fields), names.config_from_json(fields)
    assert ours.position_scale == theirs.pos_embed.interpolation_scale
    assert ours.base == theirs.pos_embed.base_size
    assert ours.size_conditions == theirs.use_additional_conditions
    assert (ours.patch_size, ours.in_channels, ours.out_channels) == (2, 4, 8)


def test_config_survives_diffusers_json_and_opens_there():
    config = tiny(text_tokens=120, position_base=16, position_scale=0.5, size_conditions=True)
    data = names.config_to_json(config)
    theirs = randomise(PixArtTransformer2DModel.from_config(data))
    back = names.config_from_json(data)
    assert names.config_to_json(back) == data
    params = read_state_dict(names.DIFFUSERS, transformer_shapes(back), theirs.state_dict())
    args = inputs(config, 6, 8, [4, 2])
    reference = run_diffusers(theirs, **args)
    for one in (config, back):  # the position base went into the scale, and means the same
        assert relative_error(forward(one, params, args), reference) <= 1e-5


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny(heads=5), "multiple of heads"),
        (lambda: tiny(width=22, heads=2), "multiple of 4"),
        (lambda: tiny(width=32, size_conditions=True), "multiple of 3"),
        (lambda: tiny(attention_backend="xla2"), "did you mean 'xla'"),
        (lambda: TransformerConfig.preset("XL/3"), "did you mean 'XL/"),
        (lambda: remat.policy("ful"), "did you mean 'full'"),
        (lambda: names.config_from_json({"norm_type": "ada_norm_zero"}), "norm_type"),
        (lambda: names.config_from_official({}), "not an official PixArt"),
    ],
)
def test_a_bad_option_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_inputs_that_do_not_fit_are_named():
    config = tiny(size_conditions=True)
    params, args = {"params": random_params(config)}, inputs(config, 8, 8, [3])
    module = PixArtTransformer(config)
    for change, message in (
        ({"latents": np.zeros((1, 7, 8, 4), np.float32)}, "multiples of 2"),
        ({"text_states": np.zeros((1, 3, 21), np.float32)}, "want \\[b, l, 20\\]"),
        ({"size": None}, "size conditions"),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(module.apply, params, **{**args, **change})

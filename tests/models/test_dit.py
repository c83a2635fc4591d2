"""The class-conditional DiT against PyTorch with the same weights: diffusers' model, and the
published formulas written out, also for grids that are not square."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel

from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig
from pixart_jax.models.dit import DiT
from pixart_jax.weights import component
from pixart_jax.weights import dit as names
from pixart_jax.weights.table import flatten, write
from tests.models import reference
from tests.models.reference import param_shapes, randomise, read_state_dict, relative_error

DIFFUSERS = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3}
DIFFUSERS |= {"sample_size": 8, "out_channels": 8, "num_embeds_ada_norm": 5}
TINY = {"depth": 3, "width": 24, "heads": 2, "num_classes": 5, "sample_size": 8}


def tiny(**overrides) -> DiTConfig:
    return DiTConfig(**{**TINY, **overrides})


dit_shapes = functools.partial(param_shapes, component.DiT)


def random_params(config: DiTConfig) -> dict:
    return reference.random_params(component.DiT, config, 0.8 / config.width**0.5)


def inputs(config: DiTConfig, height: int, width: int, labels: list[int], seed: int = 0):
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(len(labels), height, width, config.in_channels)).astype(np.float32)
    times = rng.uniform(0, 999, size=len(labels)).astype(np.float32)
    return latents, times, np.array(labels, np.int32)


def published_dit(state: dict, config: DiTConfig, latents, timesteps, labels) -> np.ndarray:
    """DiT as its paper and its released weights have it, in float64 PyTorch, over a state dict with
    the official names."""
    w = {key: torch.tensor(np.asarray(value), dtype=torch.float64) for key, value in state.items()}
    d, heads, p = config.width, config.heads, config.patch_size

    def linear(name, value):
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(value, shift, scale):
        return F.layer_norm(value, (d,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    x = torch.tensor(latents, dtype=torch.float64).permute(0, 3, 1, 2)
    x = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    frequency = torch.exp(-math.log(10000) * torch.arange(d // 4, dtype=torch.float64) / (d // 4))
    base = config.sample_size / p
    for half, count in ((0, columns), (1, rows)):
        places = torch.arange(count, dtype=torch.float64) * base / count
        table = torch.cat(
            [torch.sin(places[:, None] * frequency), torch.cos(places[:, None] * frequency)], 1
        )
        index = torch.arange(rows * columns)
        x[..., half * d // 2 : (half + 1) * d // 2] += table[
            index % columns if half == 0 else index // columns
        ]
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = torch.tensor(timesteps, dtype=torch.float64)[:, None] * frequency
    t = linear(
        "t_embedder.mlp.2",
        F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))),
    )
    condition = F.silu(t + w["y_embedder.embedding_table.weight"][torch.tensor(labels).long()])
    for i in range(config.depth):
        name = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(
            f"{name}.adaLN_modulation.1", condition
        ).chunk(6, 1)
        qkv = (
            linear(f"{name}.attn.qkv", norm(x, shift_a, scale_a))
            .reshape(len(x), -1, 3, heads, d // heads)
            .permute(2, 0, 3, 1, 4)
        )
        weights = torch.softmax(qkv[0] @ qkv[1].transpose(-1, -2) / math.sqrt(d // heads), -1)
        x = x + gate_a[:, None] * linear(
            f"{name}.attn.proj", (weights @ qkv[2]).transpose(1, 2).reshape(x.shape)
        )
        hidden = F.gelu(linear(f"{name}.mlp.fc1", norm(x, shift_m, scale_m)), approximate="tanh")
        x = x + gate_m[:, None] * linear(f"{name}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", condition).chunk(2, 1)
    x = linear("final_layer.linear", norm(x, shift, scale))
    x = torch.einsum("bhwpqc->bhpwqc", x.reshape(len(x), rows, columns, p, p, -1))
    return x.reshape(len(x), rows * p, columns * p, -1).numpy()


@pytest.mark.parametrize(
    "overrides, size",
    [
        ({}, (8, 8)),
        ({"patch_size": 4, "in_channels": 3, "out_channels": 6}, (8, 12)),
        ({"width": 84, "heads": 3}, (10, 6)),
    ],
)
def test_forward_equals_the_published_formulas(overrides, size):
    config = tiny(**overrides)
    params = random_params(config)
    args = inputs(config, *size, labels=[0, 4, 5])  # 5 is "no class"
    ours = jax.jit(DiT(config).apply)({"params": params}, *args)
    assert relative_error(ours, published_dit(write(names.OFFICIAL, params), config, *args)) <= 1e-5


@pytest.mark.parametrize(
    "fields, size",
    [
        ({}, (8, 8)),
        ({"patch_size": 4, "in_channels": 3, "out_channels": 6}, (8, 8)),
        ({"num_attention_heads": 3, "attention_head_dim": 28}, (12, 12)),
    ],
)
def test_forward_equals_diffusers(fields, size):
    theirs = DiTTransformer2DModel(**{**DIFFUSERS, **fields}, norm_eps=1e-6)
    randomise(theirs)
    for block in theirs.transformer_blocks:
        # every block has a copy of the embedders, equal in a released file
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
        # diffusers divides the frequencies' exponent by 127; the model was trained with 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    ours = names.config_from_json({"_class_name": names.DIFFUSERS_CLASS_NAME, **theirs.config})
    assert fields or ours == tiny()
    ignore = names.diffusers_ignore(ours.depth)
    params = read_state_dict(names.DIFFUSERS, dit_shapes(ours), theirs.state_dict(), ignore=ignore)
    latents, timesteps, labels = inputs(ours, *size, [0, 2, 5])  # 5 is "no class"
    with torch.no_grad():
        x = torch.tensor(latents).permute(0, 3, 1, 2)
        given = {"timestep": torch.tensor(timesteps), "class_labels": torch.tensor(labels)}
        reference = theirs(x, **given).sample.permute(0, 2, 3, 1).numpy()
    result = jax.jit(DiT(ours).apply)({"params": params}, latents, timesteps, labels)
    assert relative_error(result, reference) <= 1e-5


def test_official_names_round_trip_and_tell_the_config():
    config = tiny(width=384, heads=6, depth=2)
    params = random_params(config)
    state = write(names.OFFICIAL, params)
    assert state["blocks.1.attn.qkv.weight"].shape == (3 * 384, 384)
    state["pos_embed"] = np.zeros((1, 16, 384), np.float32)
    shapes = {key: value.shape for key, value in state.items()}
    assert names.config_from_official(shapes, pos_embed=state["pos_embed"]) == config
    back = read_state_dict(names.OFFICIAL, dit_shapes(config), state, ignore=names.OFFICIAL_IGNORE)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_config_survives_its_json():
    config = tiny(position_base=4, position_scale=0.5)
    assert names.config_from_json(names.config_to_json(config)) == config
    with pytest.raises(UserError, match="did you mean 'num_classes'"):
        names.config_from_json({"num_clases": 3})


def test_parameter_count_is_that_of_the_published_xl_2():
    """675,129,632 with the fixed position table, 256 · 1152, that the official file counts."""
    leaves = jax.tree.leaves(dit_shapes(DiTConfig.preset("XL/2")))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 675_129_632 - 256 * 1152


def test_blocks_start_as_the_identity_and_the_output_as_zero():
    config = tiny()
    boxed = jax.jit(DiT(config).init)(jax.random.key(0), *inputs(config, 8, 8, [1]))
    params = nn.unbox(boxed)["params"]
    starts_at_zero = {f"{name}/kernel" for name in ("blocks/modulation", "final_modulation")}
    for path, value in flatten(params).items():
        zero = path.endswith("bias") or path in {*starts_at_zero, "final/kernel"}
        assert np.any(value) != zero, path
    assert np.std(params["label_embedder"]["table"]) == pytest.approx(0.02, rel=0.25)
    assert not np.any(jax.jit(DiT(config).apply)({"params": params}, *inputs(config, 8, 8, [1])))


def test_gradients_do_not_depend_on_remat():
    config = tiny()
    params, args = random_params(config), inputs(config, 8, 8, [1, 5])

    def loss(params, policy):
        return jnp.square(DiT(config, remat=policy).apply({"params": params}, *args)).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (flatten(gradient(params, policy)) for policy in ("none", "full"))
    largest = max(np.abs(value).max() for value in plain.values())
    for path, value in plain.items():
        bound = 1e-5 * max(np.abs(value).max(), 1e-3 * largest)
        assert np.abs(again[path] - value).max() <= bound, path


def test_bf16_compute_stays_near_fp32():
    config = tiny(width=48)
    params, args = random_params(config), inputs(config, 8, 8, [1, 5])
    rounded, exact = (
        jax.jit(DiT(config, dtype).apply)({"params": params}, *args)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    assert relative_error(rounded, exact) <= 0.05

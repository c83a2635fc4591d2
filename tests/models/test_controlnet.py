"""The ControlNet-Transformer beside a rendering of its rule in PyTorch, and beside its base."""

from __future__ import annotations

import copy
import dataclasses

import jax
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import nn

from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.controlnet import check_fits, config_of
from pixart_jax.weights import controlnet
from pixart_jax.weights.component import ControlNet, Transformer
from tests.models.reference import (
    diffusers_pair,
    inputs,
    param_shapes,
    randomise,
    read_state_dict,
    relative_error,
)

SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4}
SIZES |= {"caption_channels": 20, "sample_size": 8}
LENGTHS = [3, 6]


class Reference(nn.Module):
    """Adapter names as in diffusers' research folder."""

    def __init__(self, base: PixArtTransformer2DModel, units: int):
        super().__init__()
        d = base.inner_dim
        self.controlnet_blocks = nn.ModuleList()
        for block in base.transformer_blocks[:units]:
            unit = nn.ModuleDict({"transformer_block": copy.deepcopy(block)})
            unit["after_proj"] = nn.Linear(d, d)
            self.controlnet_blocks.append(unit)
        self.controlnet_blocks[0]["before_proj"] = nn.Linear(d, d)
        randomise(self, seed=7)

    def forward(self, base, latents, condition, scale, timesteps, states, lengths, size, ratio):
        mask = torch.arange(states.shape[1])[None] < lengths[:, None]
        mask = ((1 - mask.float()) * -10000.0)[:, None]
        sizes = {"resolution": size, "aspect_ratio": None if ratio is None else ratio[:, None]}
        x, c = (base.pos_embed(a.permute(0, 3, 1, 2)) for a in (latents, condition))
        t0, embedded = base.adaln_single(timesteps, sizes, len(x), x.dtype)
        more = {"encoder_hidden_states": base.caption_projection(states), "timestep": t0}
        more["encoder_attention_mask"] = mask
        s = None
        for i, block in enumerate(base.transformer_blocks):
            if 0 < i <= len(self.controlnet_blocks):
                unit = self.controlnet_blocks[i - 1]
                s = x + unit["before_proj"](c) if s is None else s
                s = unit["transformer_block"](s, **more)
                x = x + scale * unit["after_proj"](s)
            x = block(x, **more)
        shift, gain = (base.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        x = base.proj_out(base.norm_out(x) * (1 + gain) + shift)
        h, w = (side // 2 for side in latents.shape[1:3])
        x = x.reshape(len(x), h, w, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(len(x), 2 * h, 2 * w, -1)


def world(**fields):
    """(their base, ours, their control, ours)."""
    theirs, config, params = diffusers_pair(**SIZES, **fields)
    base = Transformer(config, params)
    reference = Reference(theirs, 3).eval()
    ours = config_of(config)
    table, _ = controlnet.table(ours, {}, ())
    tree = read_state_dict(table, param_shapes(ControlNet, ours), reference.state_dict())
    return theirs, base, reference, ControlNet(ours, tree)


def condition_of(args) -> np.ndarray:
    return np.random.default_rng(5).normal(size=args["latents"].shape).astype(np.float32)


@pytest.mark.parametrize("size_conditions", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_forward_is_the_rule_in_pytorch_off_the_square_too(size_conditions):
    theirs, base, reference, control = world(use_additional_conditions=size_conditions)
    args = inputs(base.config, 8, 12, LENGTHS)
    condition = condition_of(args)
    given = {name: torch.tensor(value) for name, value in args.items()}
    text = given["timesteps"], given["text_states"], given["text_lengths"]
    sizes = given.get("size"), given.get("aspect_ratio")
    for scale in (1.0, 0.4):
        ours = base.apply(**args, controlnet=control, control=condition, control_scale=scale)
        with torch.no_grad():
            arguments = given["latents"], torch.tensor(condition), scale, *text, *sizes
            found = reference(theirs, *arguments).numpy()
        error = relative_error(ours, found)
        print(f"size conditions {size_conditions}, scale {scale}: {error:.1e}")
        assert error <= 1e-4
        assert relative_error(ours, base.apply(**args)) > 0.1


def zero(control: ControlNet) -> ControlNet:
    """With the projections that a ControlNet begins with."""
    nothing = jax.tree.map(np.zeros_like, control.params)
    units = {**control.params["units"], "after": nothing["units"]["after"]}
    return control.replace(params={"units": units, "before": nothing["before"]})


def test_zero_projections_and_a_scale_of_zero_give_the_base_to_the_bit():
    _, base, _, control = world()
    args = inputs(base.config, 8, 8, LENGTHS)
    given, plain = {**args, "control": condition_of(args)}, base.apply(**args)
    np.testing.assert_array_equal(base.apply(**given, controlnet=zero(control)), plain)
    np.testing.assert_array_equal(base.apply(**given, controlnet=control, control_scale=0.0), plain)


@pytest.mark.slow
def test_remat_changes_no_more_of_the_gradients_than_rounding():
    _, base, _, control = world()
    args = inputs(base.config, 8, 8, LENGTHS)
    joined, given = (
        base.with_controlnet(control),
        (condition_of(args), 1.0, *args.values(), None, None),
    )

    def loss(tree, module):
        params = {**base.params, "control": tree}
        output = module.apply({"params": params}, *given, method="controlled")
        return (output**2).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    plain = gradient(control.params, joined.module)
    again = gradient(control.params, joined.module.clone(remat="dots"))
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 48}, "of width 24 does not fit a transformer of width 48"),
        ({"heads": 4}, "with heads: 2 does not fit"),
        ({"mlp_ratio": 2.0}, "with an MLP of width 96 does not fit"),
        ({"depth": 3}, "of 3 blocks does not fit a transformer of 3"),
        ({"qk_norm": True}, "does not fit a transformer of 4 with qk_norm"),
        ({"kv_compression": 2, "kv_compression_layers": (3,)}, "without key and value compression"),
    ],
)
def test_a_controlnet_of_another_model_is_refused(change, message):
    sizes = {"depth": 4, "width": 24, "heads": 2, "caption_width": 20, "sample_size": 8}
    model = TransformerConfig(**sizes)
    check_fits(config_of(model), model)
    with pytest.raises(UserError, match=message):
        check_fits(config_of(model), dataclasses.replace(model, **change))

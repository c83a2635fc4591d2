"""diffusers' PixArt with every weight drawn at random, and ours reading the same weights."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import PixArtTransformer2DModel

from pixart_jax.models.transformer import PixArtTransformer, TransformerConfig
from pixart_jax.weights.streaming import read
from pixart_jax.weights.table import ParamMapping
from pixart_jax.weights.transformer import DIFFUSERS, config_from_json


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No weight zero and none at its init: matrices at 1/√fan_in, tables, gates and biases at a
    size that shows in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            scale = 0.5 if name.endswith("scale_shift_table") else fan_in**-0.5
            parameter.normal_(generator=generator).mul_(scale)
    return model.eval()


def abstract_params(module: nn.Module, *args) -> dict:
    return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))["params"]


def transformer_shapes(config: TransformerConfig) -> dict:
    p = config.patch_size
    return abstract_params(
        PixArtTransformer(config),
        jnp.zeros((1, p, p, config.in_channels)),
        jnp.zeros((1,)),
        jnp.zeros((1, 1, config.caption_width)),
        jnp.ones((1,), jnp.int32),
        jnp.ones((1, 2)),
        jnp.ones((1,)),
    )


def read_state_dict(table: tuple[ParamMapping, ...], shapes: dict, state: dict, **options) -> dict:
    return read(
        table,
        shapes,
        {key: np.asarray(value) for key, value in state.items()},
        source="the test's state dict",
        **options,
    )


def diffusers_pair(
    seed: int = 0, **config
) -> tuple[PixArtTransformer2DModel, TransformerConfig, dict]:
    """(their model, our config, our parameters); the keyword arguments are diffusers' config
    fields."""
    config = {"norm_type": "ada_norm_single", **config}
    config["cross_attention_dim"] = config["num_attention_heads"] * config["attention_head_dim"]
    theirs = randomise(PixArtTransformer2DModel(**config), seed)
    ours = config_from_json(theirs.config)
    return theirs, ours, read_state_dict(DIFFUSERS, transformer_shapes(ours), theirs.state_dict())


def run_diffusers(
    model, latents, timesteps, text_states, text_lengths, size=None, aspect_ratio=None
) -> np.ndarray:
    """The same arguments as ours, channels last; [b, h, w, out]."""
    mask = torch.arange(text_states.shape[1])[None] < torch.tensor(text_lengths)[:, None]
    extra = {"resolution": None, "aspect_ratio": None}
    if size is not None:
        extra = {
            "resolution": torch.tensor(size),
            "aspect_ratio": torch.tensor(aspect_ratio)[:, None],
        }
    with torch.no_grad():
        out = model(
            torch.tensor(latents).permute(0, 3, 1, 2),
            torch.tensor(text_states),
            timestep=torch.tensor(timesteps),
            added_cond_kwargs=extra,
            encoder_attention_mask=mask.float(),
        ).sample
    return out.permute(0, 2, 3, 1).numpy()


def inputs(
    config: TransformerConfig, height: int, width: int, lengths: list[int], seed: int = 0
) -> dict[str, np.ndarray]:
    """Arguments for one sample per text length."""
    rng = np.random.default_rng(seed)
    b = len(lengths)
    out = {
        "latents": rng.normal(size=(b, height, width, config.in_channels)).astype(np.float32),
        "timesteps": rng.uniform(0, 999, size=b).astype(np.float32),
        "text_states": rng.normal(size=(b, max(lengths), config.caption_width)).astype(np.float32),
        "text_lengths": np.array(lengths, np.int32),
    }
    if config.size_conditions:
        out["size"] = rng.integers(256, 2048, size=(b, 2)).astype(np.float32)
        out["aspect_ratio"] = out["size"][:, 0] / out["size"][:, 1]
    return out

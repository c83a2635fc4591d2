"""Reference models of diffusers and transformers with random weights, our parameters of the same
values, and measures of error."""

from __future__ import annotations

import functools

import flax.linen as nn
import numpy as np
import torch

from pixart_jax.models.configs import T5Config, TransformerConfig
from pixart_jax.models.quantization import applies, quantize
from pixart_jax.weights import t5
from pixart_jax.weights.component import TextEncoder, Transformer
from pixart_jax.weights.streaming import read
from pixart_jax.weights.table import ParamMapping, flatten, unflatten
from pixart_jax.weights.transformer import DIFFUSERS, config_from_json
from tests.parameters import normal_like


def relative_error(ours, theirs) -> float:
    """Largest difference over the largest magnitude."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def rms_error(ours, theirs) -> float:
    """Root mean square of the difference over that of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def randomise(model: torch.nn.Module, seed: int = 0, spread=0.5, centre=0.0) -> torch.nn.Module:
    """Give every weight a random value, so that none is zero or at its init: matrices 1/√fan_in
    wide, vectors ``spread`` wide around ``centre``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            vector = parameter.ndim == 1
            wide = spread if vector else parameter[0].numel() ** -0.5
            wide = 0.5 if name.endswith("scale_shift_table") else wide
            parameter.normal_(generator=generator).mul_(wide).add_(centre if vector else 0.0)
    return model.eval()


def param_shapes(component, config, **options) -> dict:
    """The tree of a component's parameters, as shapes."""
    return nn.unbox(component.param_shapes(config, **options))


def random_params(component, config, scale: float = 0.2, seed: int = 0) -> dict:
    """Parameters of a component, normal of this width: none is zero or at its init."""
    return normal_like(param_shapes(component, config), scale, seed)


def read_state_dict(table: tuple[ParamMapping, ...], shapes: dict, state: dict, **options) -> dict:
    state = {key: np.asarray(value) for key, value in state.items()}
    return read(table, shapes, state, source="the test's state dict", **options)


# ---- PixArt ----


transformer_shapes = functools.partial(param_shapes, Transformer)


def diffusers_pair(seed: int = 0, **fields) -> tuple[torch.nn.Module, TransformerConfig, dict]:
    """(their model, our config, our parameters), from fields of diffusers' config."""
    from diffusers import PixArtTransformer2DModel

    fields = {"norm_type": "ada_norm_single", **fields}
    fields["cross_attention_dim"] = fields["num_attention_heads"] * fields["attention_head_dim"]
    theirs = randomise(PixArtTransformer2DModel(**fields), seed)
    ours = config_from_json(theirs.config)
    return theirs, ours, read_state_dict(DIFFUSERS, transformer_shapes(ours), theirs.state_dict())


def run_diffusers(
    model, latents, timesteps, text_states, text_lengths, size=None, aspect_ratio=None
) -> np.ndarray:
    """The same arguments as ours, channels last; [b, h, w, out]."""
    mask = torch.arange(text_states.shape[1])[None] < torch.tensor(text_lengths)[:, None]
    extra = {"resolution": None, "aspect_ratio": None}
    if size is not None:
        ratio = torch.tensor(aspect_ratio)[:, None]
        extra = {"resolution": torch.tensor(size), "aspect_ratio": ratio}
    x, text = torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor(text_states)
    given = {"timestep": torch.tensor(timesteps), "encoder_attention_mask": mask.float()}
    with torch.no_grad():
        out = model(x, text, added_cond_kwargs=extra, **given).sample
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


# ---- T5 ----


t5_shapes = functools.partial(param_shapes, TextEncoder)


def t5_params(config: T5Config, state: dict, **options) -> dict:
    """Our encoder's parameters from transformers' state dict."""
    own = {key: value for key, value in state.items() if not key.startswith(t5.IGNORED_PREFIXES)}
    return read_state_dict(t5.TRANSFORMERS, t5_shapes(config), own, ignore=t5.IGNORED, **options)


def quantized(params: dict) -> dict:
    """An encoder's float parameters → those with quantization="int8"."""
    flat = flatten(params).items()
    return unflatten({path: quantize(a) if applies(path) else np.asarray(a) for path, a in flat})

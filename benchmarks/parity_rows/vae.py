"""Rows of the autoencoder beside diffusers' AutoencoderKL: posterior of images, and images of
scaled latents."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from benchmarks.parity_rows.row import Outputs, Row
from benchmarks.parity_rows.weights import materialised


def _fields(widths, layers, groups, scale, side) -> dict:
    return {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "scaling_factor": scale,
        "sample_size": side,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


TINY = _fields((8, 16, 16, 24), 1, 4, 0.3, 32)
SD = _fields((128, 256, 512, 512), 2, 32, 0.18215, 256)
SDXL = _fields((128, 256, 512, 512), 2, 32, 0.13025, 1024)


def inputs(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [1, side, side, 3] in [-1, 1] and scaled latents [1, side / 8, side / 8, 4]."""
    rng = np.random.default_rng(3)
    images = rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    return images, rng.normal(size=(1, side // 8, side // 8, 4)).astype(np.float32)


def theirs(fields: dict, side: int, old: bool, folder: Path) -> Outputs:
    """old: a .bin file with the names that the attention had before diffusers 0.17, as Stable
    Diffusion's own VAE is stored."""
    import torch
    from diffusers import AutoencoderKL

    model = materialised(lambda: AutoencoderKL(**fields))
    if old:
        renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = {}
        for key, value in model.state_dict().items():
            for new, name in renames.items():
                key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
            state[key] = value
        (folder / "vae").mkdir()
        torch.save(state, folder / "vae" / "diffusion_pytorch_model.bin")
        config = {"_class_name": "AutoencoderKL", **fields}
        (folder / "vae" / "config.json").write_text(json.dumps(config))
    else:
        model.save_pretrained(folder / "vae")
    images, latents = (
        torch.from_numpy(given).permute(0, 3, 1, 2).contiguous() for given in inputs(side)
    )

    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        decoded = model.decode(latents / model.config.scaling_factor).sample
    found = {"mean": posterior.mean, "std": posterior.std, "images": decoded}
    return {name: value.permute(0, 2, 3, 1).numpy() for name, value in found.items()}


def ours(side: int, dtype: str, folder: Path) -> Outputs:
    from pixart_jax import load_component

    part = load_component(folder / "vae", dtype=dtype)
    images, latents = inputs(side)
    mean, std = part.encode(images)
    decoded = part.decode(latents / np.float32(part.config.scaling_factor))
    return {"mean": np.asarray(mean), "std": np.asarray(std), "images": np.asarray(decoded)}


def _row(name, model, fields, side, size=None, compute="float32", old=False, **how) -> Row:
    return Row(
        name=f"vae {name}",
        model=model,
        format=".bin, old names" if old else "diffusers safetensors",
        size=size or f"{side} × {side} px",
        theirs=functools.partial(theirs, fields, side, old),
        ours=functools.partial(ours, side, compute),
        **how,
    )


_TINY, _SD, _SDXL = "AutoencoderKL", "AutoencoderKL, Stable Diffusion's", "AutoencoderKL, SDXL's"
_BF16 = {"dtype": "bf16", "bound": 2e-2, "measure": "l2"}

ROWS = (
    _row("tiny", _TINY, TINY, 64, "tiny, 64 × 64 px"),
    _row("tiny old", _TINY, TINY, 64, "tiny, 64 × 64 px", old=True),
    _row("SD", _SD, SD, 256, tier="full"),
    _row("SDXL", _SDXL, SDXL, 256, tier="full"),
    _row("SD bf16", _SD, SD, 64, compute="bfloat16", **_BF16, tier="full"),
)

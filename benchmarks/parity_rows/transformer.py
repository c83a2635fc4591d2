"""Rows of the PixArt transformer: diffusers' folders and official .pth files, beside diffusers'
model with the same weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np

from benchmarks.parity_rows import official
from benchmarks.parity_rows.row import Outputs, Row
from benchmarks.parity_rows.weights import materialised


@dataclasses.dataclass(frozen=True)
class Case:
    """diffusers' config fields; size in latents; one text length a sample; qk_norm: PixArt-Σ's,
    which diffusers' class lacks."""

    fields: dict
    height: int
    width: int
    lengths: tuple[int, ...]
    qk_norm: bool = False

    @property
    def channels(self) -> int:
        return self.fields["num_attention_heads"] * self.fields["attention_head_dim"]

    def inputs(self) -> dict[str, np.ndarray]:
        """Arguments as ours takes them."""
        count = len(self.lengths)
        rng = np.random.default_rng(count + self.height)
        latents = rng.normal(size=(count, self.height, self.width, 4))
        states = rng.normal(size=(count, max(self.lengths), self.fields["caption_channels"]))
        found = {
            "latents": latents.astype(np.float32),
            "timesteps": np.linspace(949.05, 3, count).astype(np.float32),
            "text_states": states.astype(np.float32),
            "text_lengths": np.array(self.lengths, np.int32),
        }
        if self.fields["use_additional_conditions"]:
            pixels = np.array([[8.0 * self.height, 8.0 * self.width]] * count, np.float32)
            found |= {"size": pixels, "aspect_ratio": pixels[:, 0] / pixels[:, 1]}
        return found


def _fields(depth, heads, head_dim, captions, sample, scale=1.0, multi_scale=False) -> dict:
    return {
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "caption_channels": captions,
        "sample_size": sample,
        "interpolation_scale": scale,
        "use_additional_conditions": multi_scale,
    }


TINY = Case(_fields(3, 2, 12, 20, 8), 8, 12, (7, 1, 4))
TINY_MS = Case(_fields(3, 3, 8, 17, 16, 2.0, True), 12, 20, (6, 3))
TINY_SIGMA = Case(_fields(3, 2, 12, 20, 16), 16, 12, (300, 41), qk_norm=True)
XL_256 = Case(_fields(28, 16, 72, 4096, 32), 32, 32, (120, 17))
XL_512 = Case(_fields(28, 16, 72, 4096, 64), 64, 64, (53,))
XL_MS = Case(_fields(28, 16, 72, 4096, 128, 2.0, True), 64, 96, (77,))
XL_SIGMA = Case(_fields(28, 16, 72, 4096, 32), 32, 32, (300,), qk_norm=True)


# ---- theirs ----


def build(case: Case, seed: int = 0):
    """diffusers' model with random weights. q/k norm: a LayerNorm of the full width after the
    projection, before the split into heads."""
    import torch
    from diffusers import PixArtTransformer2DModel

    def construct():
        model = PixArtTransformer2DModel(**case.fields)
        if case.qk_norm:
            for block in model.transformer_blocks:
                attn = block.attn1
                attn.to_q, attn.to_k = (
                    torch.nn.Sequential(layer, torch.nn.LayerNorm(case.channels))
                    for layer in (attn.to_q, attn.to_k)
                )
        return model

    model = materialised(construct, seed)
    side, scale = case.fields["sample_size"], case.fields["interpolation_scale"]
    shape = (side, side, model.config.patch_size, 4, case.channels)
    fresh = type(model.pos_embed)(*shape, interpolation_scale=scale)
    model.pos_embed.pos_embed = fresh.pos_embed  # a buffer that is computed at initialisation
    return model


def run(model, case: Case) -> Outputs:
    import torch

    given = {name: torch.from_numpy(array) for name, array in case.inputs().items()}
    latents = given["latents"].permute(0, 3, 1, 2).contiguous()
    size, ratio = given.get("size"), given.get("aspect_ratio")
    conditions = {"resolution": size, "aspect_ratio": None if ratio is None else ratio[:, None]}
    more = {
        "timestep": given["timesteps"],
        "added_cond_kwargs": conditions,
        "encoder_attention_mask": (
            torch.arange(max(case.lengths)) < given["text_lengths"][:, None]
        ).float(),
    }

    with torch.no_grad():
        out = model(latents, given["text_states"], **more).sample
    return {"output": out.permute(0, 2, 3, 1).numpy()}


def plain_names(state: dict) -> dict:
    """The norms after to_q and to_k under their own names."""
    renamed = {}
    for key in list(state):
        new = re.sub(r"attn1\.to_([qk])\.0\.", r"attn1.to_\1.", key)
        renamed[re.sub(r"attn1\.to_([qk])\.1\.", r"attn1.norm_\1.", new)] = state.pop(key)
    return renamed


def write_folder(case: Case, shard: str, folder: Path) -> Outputs:
    """A folder as diffusers' save_pretrained writes it; of a q/k-norm model, which it cannot name,
    the same by hand."""
    import safetensors.torch

    model = build(case)
    target = folder / "transformer"
    if not case.qk_norm:
        model.save_pretrained(target, max_shard_size=shard)
    else:
        target.mkdir()
        config = {"_class_name": "PixArtTransformer2DModel", **case.fields}
        config |= {"qk_norm": "layer_norm_across_heads", "text_tokens": 300}
        (target / "config.json").write_text(json.dumps(config))
        file = target / "diffusion_pytorch_model.safetensors"
        state = plain_names(dict(model.state_dict()))
        safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    return run(model, case)


def write_pth(case: Case, averaged: bool, both: bool, folder: Path) -> Outputs:
    """An official .pth. both: raw weights and their average in one file, as trainers write it;
    averaged: the reference has the average."""
    import torch

    model = build(case)
    result = None if averaged else run(model, case)
    content = {"epoch": 3, "state_dict": _official_state(model, case)}
    if both:
        del model
        model = build(case, seed=1)
        result = run(model, case) if averaged else result
        content["state_dict_ema"] = _official_state(model, case)
    torch.save(content, folder / "official.pth")
    return result


def _official_state(model, case: Case) -> dict:
    import torch

    state = official.transformer(plain_names(dict(model.state_dict())), case.fields["num_layers"])
    tokens = 300 if case.qk_norm else 120
    generator = torch.Generator().manual_seed(2)
    null = torch.randn(tokens, case.fields["caption_channels"], generator=generator)
    return {"pos_embed": model.pos_embed.pos_embed, "y_embedder.y_embedding": null, **state}


# ---- ours ----


def forward(part, case: Case) -> Outputs:
    """One evaluation of an opened transformer."""
    given = case.inputs()
    return {"output": np.asarray(part.apply(*given.values()))}


def open_folder(case: Case, dtype: str, folder: Path) -> Outputs:
    from pixart_jax import load_component

    return forward(load_component(folder / "transformer", dtype=dtype), case)


def open_pth(case: Case, flags: tuple[str, ...], folder: Path) -> Outputs:
    return forward(official.converted(folder / "official.pth", flags), case)


# ---- the rows ----


def _row(name, size, case, format, theirs, ours, **how) -> Row:
    sigma = "PixArt-Σ transformer, q/k norm, 300 tokens"
    model = sigma if case.qk_norm else "PixArt-α transformer"
    return Row(f"transformer {name}", model, format, size, theirs, ours, **how)


def _folder_row(name, size, case, format="diffusers safetensors", shard="10GB", **how) -> Row:
    theirs = functools.partial(write_folder, case, shard)
    dtype = "bfloat16" if how.get("dtype") == "bf16" else "float32"
    return _row(
        name, size, case, format, theirs, functools.partial(open_folder, case, dtype), **how
    )


def _pth_row(name, size, case, flags="", averaged=False, both=False, tier="quick") -> Row:
    format = "official .pth"
    if both:
        format += ", its average" if averaged else ", not its average"
    theirs = functools.partial(write_pth, case, averaged, both)
    ours = functools.partial(open_pth, case, tuple(flags.split()))
    return _row(name, size, case, format, theirs, ours, tier=tier)


_T, _MS, _SIGMA = "tiny, 64 × 96 px", "tiny multi-scale, 96 × 160 px", "tiny, 128 × 96 px"
_XL, _XL_MS = "XL/2, 256 × 256 px", "XL/2 1024-MS, 512 × 768 px"
_BF16 = {"dtype": "bf16", "bound": 2e-2, "measure": "l2"}
_SHARDED, _OURS = "diffusers safetensors, sharded", "our safetensors"

ROWS = (
    _folder_row("tiny", _T, TINY),
    _folder_row("tiny sharded", _T, TINY, _SHARDED, "20KB"),
    _folder_row("tiny multi-scale", _MS, TINY_MS),
    _folder_row("tiny sigma", _SIGMA, TINY_SIGMA, _OURS),
    _folder_row("tiny bf16", _T, TINY, **_BF16),
    _pth_row("tiny pth", _T, TINY, "--heads 2"),
    _pth_row("tiny pth averaged", _T, TINY, "--heads 2", True, True),
    _pth_row("tiny pth raw", _T, TINY, "--heads 2 --no-ema", False, True),
    _pth_row("tiny pth multi-scale", _MS, TINY_MS, "--heads 3"),
    _pth_row("tiny pth multi-scale averaged", _MS, TINY_MS, "--heads 3", True, True),
    _pth_row("tiny pth sigma", _SIGMA, TINY_SIGMA, "--heads 2"),
    _folder_row("XL/2 256", _XL, XL_256, tier="full"),
    _folder_row("XL/2 256 sharded", _XL, XL_256, _SHARDED, "500MB", tier="full"),
    _folder_row("XL/2 256 bf16", _XL, XL_256, **_BF16, tier="full"),
    _folder_row("XL/2 512", "XL/2, 512 × 512 px", XL_512, tier="full"),
    _folder_row("XL/2 multi-scale", _XL_MS, XL_MS, tier="full"),
    _folder_row("XL/2 sigma", _XL, XL_SIGMA, _OURS, tier="full"),
    _pth_row("XL/2 pth", _XL, XL_256, tier="full"),
    _pth_row("XL/2 pth multi-scale", _XL_MS, XL_MS, tier="full"),
)

"""Rows of the PixArt transformer: diffusers' folders and official .pth files, beside diffusers'
model with the same weights."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from benchmarks.parity_rows import official
from benchmarks.parity_rows.row import Row, Run, timed
from benchmarks.parity_rows.weights import materialised


@dataclasses.dataclass(frozen=True)
class Case:
    """diffusers' config fields; the canvas in latents; one text length a sample. qk_norm:
    PixArt-Σ's, which diffusers' class lacks."""

    fields: dict
    height: int
    width: int
    lengths: tuple[int, ...]
    qk_norm: bool = False

    @property
    def channels(self) -> int:
        return self.fields["num_attention_heads"] * self.fields["attention_head_dim"]

    def inputs(self) -> dict[str, np.ndarray]:
        """Arguments as ours takes them; half of the numbers that a model is told lie between whole
        ones."""
        rng = np.random.default_rng(len(self.lengths) + self.height)
        count = len(self.lengths)
        found = {
            "latents": rng.normal(size=(count, self.height, self.width, 4)).astype(np.float32),
            "timesteps": np.linspace(949.05, 3, count).astype(np.float32),
            "text_states": rng.normal(
                size=(count, max(self.lengths), self.fields["caption_channels"])
            ).astype(np.float32),
            "text_lengths": np.array(self.lengths, np.int32),
        }
        if self.fields["use_additional_conditions"]:
            pixels = np.array([[8.0 * self.height, 8.0 * self.width]] * count, np.float32)
            found |= {"size": pixels, "aspect_ratio": pixels[:, 0] / pixels[:, 1]}
        return found


def _fields(depth, heads, head_dim, captions, sample, scale=1.0, told=False) -> dict:
    return {
        "num_layers": depth,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "caption_channels": captions,
        "sample_size": sample,
        "interpolation_scale": scale,
        "use_additional_conditions": told,
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
    """diffusers' model with drawn weights. q/k norm: a LayerNorm of the full width behind the
    projection, before the heads part."""
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
    fresh = type(model.pos_embed)(
        side, side, model.config.patch_size, 4, case.channels, interpolation_scale=scale
    )
    model.pos_embed.pos_embed = fresh.pos_embed  # a buffer that is computed at initialisation
    return model


def run(model, case: Case) -> Run:
    import torch

    given = case.inputs()
    mask = torch.from_numpy(np.arange(max(case.lengths)) < given["text_lengths"][:, None]).float()
    told = {"resolution": None, "aspect_ratio": None}
    if "size" in given:
        told = {
            "resolution": torch.from_numpy(given["size"]),
            "aspect_ratio": torch.from_numpy(given["aspect_ratio"])[:, None],
        }
    latents = torch.from_numpy(given["latents"]).permute(0, 3, 1, 2).contiguous()

    def call():
        out = model(
            latents,
            torch.from_numpy(given["text_states"]),
            timestep=torch.from_numpy(given["timesteps"]),
            added_cond_kwargs=told,
            encoder_attention_mask=mask,
        )
        return {"output": out.sample.permute(0, 2, 3, 1).numpy()}

    with torch.no_grad():
        return timed(call)


def plain_names(state: dict) -> dict:
    """The norms behind to_q and to_k under names of their own."""
    renamed = {}
    for key in list(state):
        new = key
        for part in "qk":
            new = new.replace(f"attn1.to_{part}.0.", f"attn1.to_{part}.").replace(
                f"attn1.to_{part}.1.", f"attn1.norm_{part}."
            )
        renamed[new] = state.pop(key)
    return renamed


def write_folder(case: Case, shard: str, folder: Path) -> Run:
    """A folder as diffusers' save_pretrained writes it; of a q/k-norm model, which it cannot name,
    the same by hand."""
    import json

    import safetensors.torch

    model = build(case)
    if not case.qk_norm:
        model.save_pretrained(folder / "transformer", max_shard_size=shard)
    else:
        (folder / "transformer").mkdir()
        config = {
            "_class_name": "PixArtTransformer2DModel",
            **case.fields,
            "qk_norm": "layer_norm_across_heads",
            "text_tokens": 300,
        }
        (folder / "transformer" / "config.json").write_text(json.dumps(config))
        state = plain_names(dict(model.state_dict()))
        safetensors.torch.save_file(
            state,
            folder / "transformer" / "diffusion_pytorch_model.safetensors",
            metadata={"format": "pt"},
        )
    return run(model, case)


def write_pth(case: Case, averaged: bool, both: bool, folder: Path) -> Run:
    """An official .pth. both: the raw weights and their average in one file, as trainers leave it;
    averaged: the reference has those."""
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


def forward(part, case: Case) -> Run:
    """One evaluation of an opened transformer; a function of its own, so that the conversions of
    both sides stay apart."""
    given = case.inputs()
    return timed(lambda: {"output": np.asarray(part.apply(*given.values()))})


def open_folder(case: Case, dtype: str, folder: Path) -> Run:
    from pixart_jax import load_component

    return forward(load_component(folder / "transformer", dtype=dtype), case)


def open_pth(case: Case, flags: tuple[str, ...], folder: Path) -> Run:
    """By way of ``python -m pixart_jax convert``, as a person would."""
    from pixart_jax import load_component
    from pixart_jax.commands import convert

    convert.main([str(folder / "official.pth"), str(folder / "converted"), *flags])
    return forward(load_component(folder / "converted"), case)


# ---- the rows ----


def _folder_row(name, size, case, shard="10GB", dtype="fp32", **how) -> Row:
    full = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    return Row(
        name=f"transformer {name}",
        model="PixArt-Σ transformer, q/k norm, 300 tokens"
        if case.qk_norm
        else "PixArt-α transformer",
        size=size,
        dtype=dtype,
        theirs=functools.partial(write_folder, case, shard),
        ours=functools.partial(open_folder, case, full),
        **{"format": "diffusers safetensors", **how},
    )


def _pth_row(name, size, case, format, flags=(), averaged=False, both=False, **how) -> Row:
    return Row(
        name=f"transformer {name}",
        model="PixArt-Σ transformer, q/k norm, 300 tokens"
        if case.qk_norm
        else "PixArt-α transformer",
        format=format,
        size=size,
        theirs=functools.partial(write_pth, case, averaged, both),
        ours=functools.partial(open_pth, case, flags),
        **how,
    )


_TWO, _THREE = ("--heads", "2"), ("--heads", "3")
_BF16 = {"dtype": "bf16", "bound": 2e-2, "measure": "l2"}
_FULL = {"tier": "full"}
_SHARDED = {"format": "diffusers safetensors, sharded"}

ROWS = (
    _folder_row("tiny", "tiny, 64 × 96 px", TINY),
    _folder_row("tiny sharded", "tiny, 64 × 96 px", TINY, shard="20KB", **_SHARDED),
    _folder_row("tiny multi-scale", "tiny multi-scale, 96 × 160 px", TINY_MS),
    _folder_row("tiny sigma", "tiny, 128 × 96 px", TINY_SIGMA, format="our safetensors"),
    _folder_row("tiny bf16", "tiny, 64 × 96 px", TINY, **_BF16),
    _pth_row("tiny pth", "tiny, 64 × 96 px", TINY, "official .pth", _TWO),
    _pth_row(
        "tiny pth averaged",
        "tiny, 64 × 96 px",
        TINY,
        "official .pth, its average",
        _TWO,
        averaged=True,
        both=True,
    ),
    _pth_row(
        "tiny pth raw",
        "tiny, 64 × 96 px",
        TINY,
        "official .pth, not its average",
        (*_TWO, "--no-ema"),
        both=True,
    ),
    _pth_row(
        "tiny pth multi-scale", "tiny multi-scale, 96 × 160 px", TINY_MS, "official .pth", _THREE
    ),
    _pth_row(
        "tiny pth multi-scale averaged",
        "tiny multi-scale, 96 × 160 px",
        TINY_MS,
        "official .pth, its average",
        _THREE,
        True,
        True,
    ),
    _pth_row("tiny pth sigma", "tiny, 128 × 96 px", TINY_SIGMA, "official .pth", _TWO),
    _folder_row("XL/2 256", "XL/2, 256 × 256 px", XL_256, **_FULL),
    _folder_row(
        "XL/2 256 sharded", "XL/2, 256 × 256 px", XL_256, shard="500MB", **_SHARDED, **_FULL
    ),
    _folder_row("XL/2 256 bf16", "XL/2, 256 × 256 px", XL_256, **_BF16, **_FULL),
    _folder_row("XL/2 512", "XL/2, 512 × 512 px", XL_512, **_FULL),
    _folder_row("XL/2 multi-scale", "XL/2 1024-MS, 512 × 768 px", XL_MS, **_FULL),
    _folder_row("XL/2 sigma", "XL/2, 256 × 256 px", XL_SIGMA, format="our safetensors", **_FULL),
    _pth_row("XL/2 pth", "XL/2, 256 × 256 px", XL_256, "official .pth", **_FULL),
    _pth_row("XL/2 pth multi-scale", "XL/2 1024-MS, 512 × 768 px", XL_MS, "official .pth", **_FULL),
)

"""Rows of the class-conditional DiT: official .pt files, beside diffusers' DiT with its two known
differences mended."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from benchmarks.parity_rows import official
from benchmarks.parity_rows.row import Outputs, Row
from benchmarks.parity_rows.weights import materialised

_FIELDS = (
    "num_layers num_attention_heads attention_head_dim sample_size num_embeds_ada_norm"
).split()
TINY = dict(zip(_FIELDS, (3, 2, 12, 8, 6)))
XL = dict(zip(_FIELDS, (28, 16, 72, 32, 1000)))


def inputs(fields: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(latents, timesteps, labels); the last label is "no class"."""
    side, classes = fields["sample_size"], fields["num_embeds_ada_norm"]
    latents = np.random.default_rng(1).normal(size=(2, side, side, 4)).astype(np.float32)
    return latents, np.array([3.0, 700.5], np.float32), np.array([2, classes], np.int32)


def build(fields: dict):
    """diffusers' model, computing as the published one does, which the released weights are for.

    diffusers divides the exponent of the timestep's frequencies by 127 and takes 1e-5 for the
    norms' epsilon; the published model has 128 and 1e-6. Its blocks carry copies of one embedder,
    which are one object here.
    """
    from diffusers import DiTTransformer2DModel

    def construct():
        model = DiTTransformer2DModel(**fields, out_channels=8, norm_eps=1e-6)
        first = model.transformer_blocks[0].norm1.emb
        first.time_proj.downscale_freq_shift = 0
        for block in model.transformer_blocks[1:]:
            block.norm1.emb = first
        return model

    model = materialised(construct)
    side = fields["sample_size"]
    width = fields["num_attention_heads"] * fields["attention_head_dim"]
    fresh = type(model.pos_embed)(side, side, model.config.patch_size, 4, width)
    model.pos_embed.pos_embed = fresh.pos_embed  # a buffer that is computed at initialisation
    return model


def theirs(fields: dict, folder: Path) -> Outputs:
    import torch

    model = build(fields)
    latents, timesteps, labels = inputs(fields)
    given = torch.from_numpy(latents).permute(0, 3, 1, 2).contiguous()

    conditions = {"timestep": torch.from_numpy(timesteps)}
    conditions["class_labels"] = torch.from_numpy(labels).long()

    with torch.no_grad():
        out = model(given, **conditions).sample.permute(0, 2, 3, 1).numpy()
    state = official.dit(dict(model.state_dict()), fields["num_layers"])
    torch.save({"pos_embed": model.pos_embed.pos_embed, **state}, folder / "official.pt")
    return {"output": out}


def ours(flags: tuple[str, ...], fields: dict, folder: Path) -> Outputs:
    part = official.converted(folder / "official.pt", flags)
    return {"output": np.asarray(part.apply(*inputs(fields)))}


def _row(name, size, fields, flags=(), **how) -> Row:
    return Row(
        name=f"dit {name}",
        model="DiT",
        format="official .pt",
        size=size,
        theirs=functools.partial(theirs, fields),
        ours=functools.partial(ours, flags, fields),
        **how,
    )


ROWS = (
    _row("tiny", "tiny, 64 × 64 px", TINY, ("--heads", "2")),
    _row("XL/2", "XL/2, 256 × 256 px", XL, tier="full"),
)

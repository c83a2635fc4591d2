"""Rows of PixArt-Σ with key and value compression, from an official .pth, beside a PyTorch model of
the official names (tests/models/)."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from benchmarks.parity_rows import official
from benchmarks.parity_rows.row import Outputs, Row
from benchmarks.parity_rows.weights import materialised

_SIGMA = {"text_tokens": 300, "kv_compression": 2}
TINY = dict(depth=3, width=24, heads=2, caption_width=20, sample_size=16, position_scale=0.25)
TINY |= {**_SIGMA, "qk_norm": True, "kv_compression_layers": (1, 2)}
# as the released configs compress: the second half
XL = dict(caption_width=4096, sample_size=64, position_scale=1.0, **_SIGMA)
XL |= {"kv_compression_layers": tuple(range(14, 28))}


def inputs(fields: dict, rows: int, columns: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {
        "latents": rng.normal(size=(1, rows, columns, 4)).astype(np.float32),
        "timesteps": np.array([427.5], np.float32),
        "text_states": rng.normal(size=(1, length, fields["caption_width"])).astype(np.float32),
        "text_lengths": np.array([length - 3], np.int32),
    }


def theirs(fields: dict, canvas: tuple, folder: Path) -> Outputs:
    import torch

    from pixart_jax.models.transformer import TransformerConfig
    from tests.models.official_reference import OfficialPixArt, positions, run_official

    config = TransformerConfig(**fields)
    model = materialised(lambda: OfficialPixArt(config), 0)
    side = config.sample_size // config.patch_size
    model.pos_embed = positions(side, side, config.width, config.base, config.position_scale)[None]
    generator = torch.Generator().manual_seed(2)
    model.y_embedder.y_embedding = torch.randn(
        config.text_tokens, config.caption_width, generator=generator
    )
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "official.pth")
    given = inputs(fields, *canvas)
    return {"output": run_official(model, **given)}


def ours(fields: dict, canvas: tuple, flags: tuple[str, ...], folder: Path) -> Outputs:
    part = official.converted(folder / "official.pth", flags)
    assert part.config.kv_compression_layers == fields["kv_compression_layers"]
    given = inputs(fields, *canvas)
    return {"output": np.asarray(part.apply(*given.values()))}


def _row(name: str, size: str, fields: dict, canvas: tuple, flags=(), **how) -> Row:
    return Row(
        name=f"transformer {name}",
        model="PixArt-Σ transformer, key and value compression, 300 tokens",
        format="official .pth",
        size=size,
        theirs=functools.partial(theirs, fields, canvas),
        ours=functools.partial(ours, fields, canvas, flags),
        **how,
    )


ROWS = (
    _row("tiny pth kv", "tiny, 128 × 112 px, with q/k norm", TINY, (16, 14, 300), ("--heads", "2")),
    _row("XL/2 pth kv", "XL/2, 512 × 384 px", XL, (64, 48, 77), tier="full"),
)

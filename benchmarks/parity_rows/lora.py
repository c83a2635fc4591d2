"""Rows of LoRA: peft's folder over a transformer, beside peft's model with the same weights."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks.parity_rows.row import Outputs, Row
from benchmarks.parity_rows.transformer import TINY, TINY_MS, XL_256, Case, build, forward, run

# the official training scripts' layers
TARGETS = "to_k to_q to_v to_out.0 ff.net.0.proj ff.net.2 proj linear linear_1 linear_2 proj_out"


def write(case: Case, options: dict, folder: Path) -> Outputs:
    """The model and an adapter with random weights, in folders."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = build(case)
    model.save_pretrained(folder / "transformer")
    adapted = get_peft_model(model, LoraConfig(target_modules=TARGETS.split(), **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(generator=generator).mul_(0.3 * parameter[0].numel() ** -0.5)
    adapted.save_pretrained(folder / "adapter")
    return run(adapted.eval(), case)


def read(case: Case, folder: Path) -> Outputs:
    from pixart_jax import load_component

    part = load_component(folder / "transformer")
    return forward(part.with_lora(folder / "adapter"), case)


def _row(name, size, case, format, tier="quick", **options) -> Row:
    theirs = functools.partial(write, case, options)
    ours = functools.partial(read, case)
    model = "LoRA of the PixArt-α transformer"
    return Row(f"lora {name}", model, format, size, theirs, ours, tier=tier)


ROWS = (
    _row("tiny", "tiny, 64 × 96 px", TINY, "peft, rank 4", r=4),
    _row("tiny dora", "tiny multi-scale, 96 × 160 px", TINY_MS, "peft, DoRA", r=4, use_dora=True),
    _row("XL/2 256", "XL/2, 256 × 256 px", XL_256, "peft, rank 16", "full", r=16, lora_alpha=16),
)

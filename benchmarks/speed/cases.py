"""What is measured: a model, an image size, a batch, a dtype and a kind of work."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from pixart_jax.models import flops
from pixart_jax.models.configs import PRESETS, TransformerConfig
from pixart_jax.models.controlnet import config_of

Arrays = dict[str, np.ndarray]
TINY = "tiny"  # the model of a rehearsal
MODELS = (*PRESETS, TINY)
LATENT = 8  # pixels a side of a latent
PROMPTS = ("a large red star left of a small blue circle", "a green square above a yellow circle")
WORDS = sorted(set(" ".join(PROMPTS).split()))  # the tokenizer's vocabulary
_T5_XXL = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
_T5_TINY = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement. Images are square; training holds fp32 parameters in either dtype."""

    # 'forward', 'control' (the same under a ControlNet), 'sample' (text states → latents), 'draw'
    # (prompts → PNG) or 'train'
    kind: str
    model: str
    px: int
    batch: int
    dtype: str  # 'float32' or 'bfloat16'
    multi_scale: bool = False  # size and aspect ratio are inputs, as in PixArt-XL-2-1024-MS
    text_tokens: int = 120  # texts are padded to this length
    steps: int = 20
    guidance: float = 4.5

    @property
    def config(self) -> TransformerConfig:
        side = self.px // LATENT
        fields: dict[str, Any] = {
            "size_conditions": self.multi_scale,
            "sample_size": side,
            "position_scale": float(max(side // 64, 1)),
        }
        if self.model == TINY:
            return TransformerConfig(depth=2, width=48, heads=2, caption_width=32, **fields)
        return TransformerConfig.preset(self.model, **fields)

    @property
    def t5(self) -> dict[str, int]:
        """The text encoder's sizes, under the names that both sides' configs have."""
        return _T5_TINY if self.model == TINY else _T5_XXL

    @property
    def vae(self) -> dict[str, Any]:
        """The autoencoder's sizes, under the names that both sides' configs have."""
        widths, layers, groups = (128, 256, 512, 512), 2, 32
        if self.model == TINY:
            widths, layers, groups = (8, 8, 8, 8), 1, 4
        return dict(block_out_channels=widths, layers_per_block=layers, norm_num_groups=groups)

    @property
    def prompts(self) -> list[str]:
        return [PROMPTS[n % len(PROMPTS)] for n in range(self.batch)]

    @property
    def size(self) -> str:
        """'1024ms' and the like, as --px takes it."""
        return f"{self.px}{'ms' if self.multi_scale else ''}"

    @property
    def flops(self) -> float:
        """Model FLOPs of one run, the transformer's alone, the same count for both sides.

        In sampling a text's keys and values count once, whichever side computes them again.
        """
        shape = self.config, self.px, self.px, self.text_tokens
        if self.kind == "train":
            return self.batch * flops.train_flops(*shape)
        if self.kind == "forward":
            return self.batch * flops.forward_flops(*shape)
        if self.kind == "control":
            return self.batch * flops.forward_flops(*shape, config_of(self.config).depth)
        text = flops.forward_flops(self.config, 0, 0, self.text_tokens)
        text -= flops.forward_flops(self.config, 0, 0, 0)
        step = flops.forward_flops(*shape) - text
        halves = 1 if self.guidance == 1 else 2
        return self.batch * halves * (text + self.steps * step)

    def __str__(self) -> str:
        return f"{self.kind} {self.model} {self.size} px, batch {self.batch}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Work:
    """A case that a side has opened. result: the first run's output → arrays to compare. facts: for
    the row."""

    run: Callable[[], Any]
    result: Callable[[Any], Arrays]
    facts: dict = dataclasses.field(default_factory=dict)


def sizes(text: str) -> list[tuple[int, bool]]:
    """'256,1024ms' → [(pixels, multi-scale)], for argparse."""
    found = []
    for part in text.split(","):
        number = part.removesuffix("ms")
        if not number.isdigit() or int(number) < 16 or int(number) % 16:
            raise argparse.ArgumentTypeError(
                f"{part!r}: multiples of 16 pixels with commas between, 'ms' after a multi-scale "
                "model's"
            )
        found.append((int(number), part.endswith("ms")))
    return found


def numbers(text: str) -> list[int]:
    """'1,16' → [1, 16], for argparse."""
    found = text.split(",")
    if not all(part.isdigit() and int(part) for part in found):
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between")
    return [int(part) for part in found]

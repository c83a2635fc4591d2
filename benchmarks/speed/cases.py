"""What is measured: a model, a size, a batch, a dtype and a kind of work; and how much arithmetic
that is."""

from __future__ import annotations

import argparse
import dataclasses

from pixart_jax.models import flops
from pixart_jax.models.geometry import PRESETS
from pixart_jax.models.transformer import TransformerConfig

TINY = "tiny"  # of a rehearsal
MODELS = (*PRESETS, TINY)
LATENT = 8  # pixels a side of a latent
PROMPTS = ("a large red star left of a small blue circle", "a green square above a yellow circle")
WORDS = sorted(set(" ".join(PROMPTS).split()))  # of a tokenizer that knows these alone


@dataclasses.dataclass(frozen=True)
class Case:
    """kind: 'forward', 'sample' (text states → latents), 'draw' (prompts → PNG files) or 'train'.
    Images are square.

    multi_scale: the model is told the size and the aspect ratio, as PixArt-XL-2-1024-MS is.
    text_tokens: what texts are padded to.
    steps, guidance: of sampling.
    """

    kind: str
    model: str
    px: int
    batch: int
    dtype: str  # 'float32' or 'bfloat16'; training holds fp32 parameters in either
    multi_scale: bool = False
    text_tokens: int = 120
    steps: int = 20
    guidance: float = 4.5

    @property
    def config(self) -> TransformerConfig:
        side = self.px // LATENT
        told = {
            "size_conditions": self.multi_scale,
            "sample_size": side,
            "position_scale": float(max(side // 64, 1)),
        }
        if self.model == TINY:
            return TransformerConfig(depth=2, width=48, heads=2, caption_width=32, **told)
        return TransformerConfig.preset(self.model, **told)

    @property
    def size(self) -> str:
        """'1024ms' and the like, as --px takes it."""
        return f"{self.px}{'ms' if self.multi_scale else ''}"

    @property
    def flops(self) -> float:
        """Model FLOPs of one run: what the mathematics asks for, the same count for both sides
        (pixart_jax/models/flops.py).

        Of drawing, the transformer's alone. In sampling a text's keys and values count once,
        whichever side computes them anew.
        """
        how = self.config, self.px, self.px, self.text_tokens
        if self.kind == "train":
            return self.batch * flops.train_flops(*how)
        if self.kind == "forward":
            return self.batch * flops.forward_flops(*how)
        return self.batch * flops.sampling_flops(*how, steps=self.steps, guided=self.guidance != 1)

    def __str__(self) -> str:
        return f"{self.kind} {self.model} {self.size} px, batch {self.batch}, {self.dtype}"


def sizes(text: str) -> list[tuple[int, bool]]:
    """'256,1024ms' → [(pixels, multi-scale)], for argparse."""
    found = []
    for part in text.split(","):
        number, told = part.removesuffix("ms"), part.endswith("ms")
        if not number.isdigit() or int(number) < 16 or int(number) % 16:
            raise argparse.ArgumentTypeError(
                f"{part!r}: multiples of 16 pixels with commas between, 'ms' behind a multi-scale "
                "model's"
            )
        found.append((int(number), told))
    return found


def numbers(text: str) -> list[int]:
    """'1,16' → [1, 16], for argparse."""
    found = text.split(",")
    if not all(part.isdigit() and int(part) for part in found):
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between")
    return [int(part) for part in found]

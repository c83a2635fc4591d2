"""The PixArt-α transformer."""

from __future__ import annotations

import dataclasses

from pixart_jax.models.geometry import Geometry


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Geometry):
    """Sizes of a PixArt transformer.

    size_conditions: the multi-scale model, told the image's size and aspect ratio. text_tokens: the longest caption, and
    the length of the null caption. qk_norm: LayerNorm on the queries and keys of self-attention (PixArt-Σ's option).
    """

    caption_width: int = 4096
    text_tokens: int = 120
    size_conditions: bool = False
    qk_norm: bool = False

    def __post_init__(self):
        super().__post_init__()
        for field in ("caption_width", "text_tokens"):
            self.require(getattr(self, field) >= 1, field, "must be at least 1")
        self.require(not self.size_conditions or self.width % 3 == 0, "width", "must be a multiple of 3 with size_conditions (height, width, ratio)")

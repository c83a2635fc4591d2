"""Configs: their checks, and what the PixArt transformer and the class-conditional DiT share."""

from __future__ import annotations

import dataclasses
from typing import Self

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.attention import check_backend

# name: (depth, width, heads), as in DiT.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4)
PRESETS = tuple(f"{size}/{patch}" for size in SIZES for patch in PATCHES)


class CheckedConfig:
    """A config that is checked when it is built."""

    def require(self, condition: bool, field: str, what: str) -> None:
        """Raise a UserError that names the field, its value and what is valid."""
        if not condition:
            raise UserError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: {what}")

    def require_positive(self, *fields: str) -> None:
        """Every field is at least 1."""
        for field in fields:
            self.require(getattr(self, field) >= 1, field, "must be at least 1")


@dataclasses.dataclass(frozen=True)
class BackboneConfig(CheckedConfig):
    """Sizes of a diffusion transformer on latents.

    sample_size: side of the latent grid in training. The coordinate of patch i of
    n along an axis is i · position_base / n / position_scale, so any grid spans the same range;
    position_base None means sample_size // patch_size.
    """

    depth: int = 28
    width: int = 1152
    heads: int = 16
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8  # the prediction, then the variance logits
    mlp_ratio: float = 4.0
    sample_size: int = 32
    position_base: int | None = None
    position_scale: float = 1.0
    attention_backend: str = "auto"  # of models/attention.py

    def __post_init__(self):
        self.require_positive("depth", "width", "heads", "patch_size")
        self.require_positive("in_channels", "out_channels", "sample_size")
        self.require(
            self.width % self.heads == 0, "width", f"must be a multiple of heads = {self.heads}"
        )
        positions = "must be a multiple of 4 (sine and cosine of two coordinates)"
        self.require(self.width % 4 == 0, "width", positions)
        self.require(self.mlp_ratio > 0, "mlp_ratio", "must be positive")
        self.require(
            self.sample_size % self.patch_size == 0,
            "sample_size",
            f"must be a multiple of patch_size = {self.patch_size}",
        )
        base = self.position_base
        self.require(base is None or base >= 1, "position_base", "must be at least 1, or None")
        self.require(self.position_scale > 0, "position_scale", "must be positive")
        check_backend(self.attention_backend)

    @classmethod
    def preset(cls, name: str, **overrides) -> Self:
        """A preset such as 'XL/2': size S, B, L or XL, and the patch size."""
        if name not in PRESETS:
            raise UserError(f"model preset {name!r} is unknown{nearest(name, PRESETS)}")
        size, patch = name.split("/")
        depth, width, heads = SIZES[size]
        sizes = {"depth": depth, "width": width, "heads": heads, "patch_size": int(patch)}
        return cls(**{**sizes, **overrides})

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)

    @property
    def base(self) -> int:
        """Base size of the position table, in patches."""
        return self.position_base or self.sample_size // self.patch_size

    def grid(self, latents_shape: tuple[int, ...]) -> tuple[int, int]:
        """(rows, columns) of patches of latents [b, h, w, c]; UserError where they do not fit."""
        _, height, width, channels = latents_shape
        if channels != self.in_channels or height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"latents {tuple(latents_shape)} do not fit: want [b, h, w, {self.in_channels}], "
                f"h and w multiples of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

"""Configs of the models: sizes as frozen dataclasses that check themselves. Importing them imports
no JAX."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from pixart_jax.errors import UserError, nearest

BACKENDS = ("auto", "xla", "cudnn", "splash")
"""Attention kernels of models/attention.py."""
CONTEXT_ATTENTIONS = ("all_gather", "ring")
"""How context-parallel attention exchanges keys and values (models/ring.py)."""
# name: (depth, width, heads), as in DiT.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4)
PRESETS = tuple(f"{size}/{patch}" for size in SIZES for patch in PATCHES)


def check_backend(name: str) -> None:
    """Raise UserError for an unknown backend."""
    if name not in BACKENDS:
        raise UserError(f"attention backend {name!r} is unknown{nearest(name, BACKENDS)}")


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


@dataclasses.dataclass(frozen=True)
class TransformerConfig(BackboneConfig):
    """Sizes of a PixArt transformer.

    size_conditions: the multi-scale model, conditioned on the image's size and aspect ratio.
    text_tokens: the longest caption, and the length of the null caption. qk_norm: LayerNorm on the
    queries and keys of self-attention (an option of PixArt-Σ). kv_compression: R; the
    self-attention of kv_compression_layers (counted from 0) reads one key and value for every R × R
    patches (PixArt-Σ: 2, in the last 14 of 28 layers). 1: no compression.
    """

    caption_width: int = 4096
    text_tokens: int = 120
    size_conditions: bool = False
    qk_norm: bool = False
    kv_compression: int = 1
    kv_compression_layers: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        # a list, as JSON gives it, is not hashable, and a config is a static argument of jit
        object.__setattr__(self, "kv_compression_layers", tuple(self.kv_compression_layers))
        self.require_positive("caption_width", "text_tokens", "kv_compression")
        self.require(
            not self.size_conditions or self.width % 3 == 0,
            "width",
            "must be a multiple of 3 with size_conditions (height, width, ratio)",
        )
        layers, compressed = self.kv_compression_layers, self.kv_compression > 1
        self.require(
            bool(layers) == compressed,
            "kv_compression_layers",
            f"must name {'at least one layer' if compressed else 'no layer'} with "
            f"kv_compression = {self.kv_compression}",
        )
        self.require(
            set(layers) <= set(range(self.depth)) and list(layers) == sorted(set(layers)),
            "kv_compression_layers",
            f"must be layers of 0 … {self.depth - 1}, each once and in ascending order",
        )


@dataclasses.dataclass(frozen=True)
class ControlNetConfig(CheckedConfig):
    """Sizes of a ControlNet: ``depth`` copies of blocks of a transformer of these widths."""

    depth: int = 13
    width: int = 1152
    heads: int = 16
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    attention_backend: str = "auto"

    def __post_init__(self):
        self.require_positive("depth", "width", "heads")
        rule = f"must be a multiple of heads = {self.heads}"
        self.require(self.width % self.heads == 0, "width", rule)

    @property
    def mlp_width(self) -> int:
        return round(self.width * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class DiTConfig(BackboneConfig):
    """Sizes of a DiT. num_classes: labels are 0 … num_classes − 1, and num_classes itself is "no
    class"."""

    num_classes: int = 1000

    def __post_init__(self):
        super().__post_init__()
        self.require_positive("num_classes")


@dataclasses.dataclass(frozen=True)
class T5Config(CheckedConfig):
    """Sizes of a T5 v1.1 encoder; the defaults are T5-XXL's (4.76G parameters). Names as in
    transformers' config.json."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        self.require_positive("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
        buckets = self.relative_attention_num_buckets
        fits = buckets >= 4 and buckets % 4 == 0
        self.require(fits, "relative_attention_num_buckets", "must be a multiple of 4")
        fits = self.relative_attention_max_distance > buckets // 4
        least = f"must be more than relative_attention_num_buckets / 4 = {buckets // 4}"
        self.require(fits, "relative_attention_max_distance", least)
        self.require(self.layer_norm_epsilon > 0, "layer_norm_epsilon", "must be positive")


@dataclasses.dataclass(frozen=True)
class VAEConfig(CheckedConfig):
    """Sizes of an autoencoder; the defaults are Stable Diffusion's (83.7M parameters).

    block_out_channels: the width of each level; resolution halves between levels. use_quant_conv: a
    1×1 convolution after the encoder and one before the decoder. mid_block_attention: single-head
    attention at the lowest resolution of each half. sample_size: side in pixels of the training
    images, informative only. shift_factor: subtracted from latents before scaling (Stable Diffusion
    3, Flux).
    """

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    mid_block_attention: bool = True
    sample_size: int = 256

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        self.require_positive("in_channels", "latent_channels", "layers_per_block")
        self.require_positive("norm_num_groups", "sample_size")
        widths, groups = self.block_out_channels, self.norm_num_groups
        self.require(bool(widths), "block_out_channels", "is empty: name one width a level")
        for width in widths:
            fits = width >= 1 and width % groups == 0
            what = f"{width} is not divisible by norm_num_groups = {groups}"
            self.require(fits, "block_out_channels", what)
        self.require(self.scaling_factor > 0, "scaling_factor", "must be positive")

    @property
    def factor(self) -> int:
        """Pixels a latent cell spans in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    def scaled(self, latents: Any) -> Any:
        """The VAE's latents as the transformer sees them."""
        return (latents - self.shift_factor) * self.scaling_factor

    def unscaled(self, latents: Any) -> Any:
        """The inverse of :meth:`scaled`."""
        return latents / self.scaling_factor + self.shift_factor


@dataclasses.dataclass(frozen=True)
class HEDConfig(CheckedConfig):
    """Sizes of the HED edge network: the width and the number of convolutions of each block; the
    defaults are those of ControlNetHED (14.7M parameters)."""

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    layers: tuple[int, ...] = (2, 2, 3, 3, 3)

    def __post_init__(self):
        fits = len(self.widths) == len(self.layers) > 0 and min(*self.widths, *self.layers) >= 1
        self.require(fits, "widths", f"must be positive, one for each of layers {self.layers}")

"""AutoencoderKL as diffusers stores it, and its config.json."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from pixart_jax.errors import UserError
from pixart_jax.models.configs import VAEConfig
from pixart_jax.weights.table import ParamMapping, layer

CLASS_NAME = "AutoencoderKL"  # config.json's _class_name

ANCHORS = ("encoder.conv_in.weight", "decoder.conv_in.weight")
_ATTENTION = "mid_block.attentions.0"
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# the keys before diffusers 0.17: the current ones
ALIASES = {
    f"{half}.{_ATTENTION}.{old}.{part}": f"{half}.{_ATTENTION}.{new}.{part}"
    for half in ("encoder", "decoder")
    for old, new in zip(("query", "key", "value", "proj_attn"), _PROJECTIONS, strict=True)
    for part in ("weight", "bias")
}


# config.json's fields: (ours, diffusers' default)
_FIELDS = {
    "block_out_channels": ("block_out_channels", (64,)),
    "in_channels": ("in_channels", 3),
    "latent_channels": ("latent_channels", 4),
    "layers_per_block": ("layers_per_block", 1),
    "mid_block_add_attention": ("mid_block_attention", True),
    "norm_num_groups": ("norm_num_groups", 32),
    "sample_size": ("sample_size", 32),
    "scaling_factor": ("scaling_factor", 0.18215),
    "shift_factor": ("shift_factor", 0.0),
    "use_quant_conv": ("use_quant_conv", True),
}


def table(config: VAEConfig, values: Mapping, keys: Container[str] = ()) -> tuple:
    """(the entries, one for each level and layer, which differ in shape; keys to ignore)."""
    levels = len(config.block_out_channels)
    entries: list[ParamMapping] = []
    for half, level_name, blocks, layers in (
        ("encoder", "down", "down_blocks", config.layers_per_block),
        ("decoder", "up", "up_blocks", config.layers_per_block + 1),
    ):
        entries += layer(f"{half}/conv_in/conv", f"{half}.conv_in", "conv")
        for level in range(levels):
            theirs = f"{half}.{blocks}.{level}"
            for i in range(layers):
                entries += _residual(
                    f"{half}/{level_name}_{level}_resnet_{i}", f"{theirs}.resnets.{i}"
                )
            path = f"{half}/{level_name}_{level}_{level_name}sample/conv"
            entries += layer(path, f"{theirs}.{level_name}samplers.0.conv", "conv")
        for i in range(2):
            entries += _residual(f"{half}/mid/resnet_{i}", f"{half}.mid_block.resnets.{i}")
        entries += _norm(f"{half}/mid/attention/norm", f"{half}.{_ATTENTION}.group_norm")
        for ours, theirs in zip(("query", "key", "value", "out"), _PROJECTIONS, strict=True):
            entries += layer(f"{half}/mid/attention/{ours}", f"{half}.{_ATTENTION}.{theirs}")
        entries += _norm(f"{half}/norm_out", f"{half}.conv_norm_out")
        entries += layer(f"{half}/conv_out/conv", f"{half}.conv_out", "conv")
    entries += layer("quant", "quant_conv", "pointwise")
    entries += layer("post_quant", "post_quant_conv", "pointwise")
    return tuple(entries), ()


def _norm(ours: str, theirs: str) -> tuple[ParamMapping, ...]:
    scale = ParamMapping(f"{ours}/scale", f"{theirs}.weight")
    return scale, ParamMapping(f"{ours}/bias", f"{theirs}.bias")


def _residual(ours: str, theirs: str) -> tuple[ParamMapping, ...]:
    return (
        *_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *layer(f"{ours}/conv1/conv", f"{theirs}.conv1", "conv"),
        *_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *layer(f"{ours}/conv2/conv", f"{theirs}.conv2", "conv"),
        *layer(f"{ours}/shortcut", f"{theirs}.conv_shortcut", "pointwise"),
    )


def config_from_json(values: Mapping) -> VAEConfig:
    """diffusers' config.json → VAEConfig. UserError for another architecture."""
    found = {ours: values.get(name, default) for name, (ours, default) in _FIELDS.items()}
    found["block_out_channels"] = widths = tuple(found["block_out_channels"])
    found["shift_factor"] = found["shift_factor"] or 0.0
    for name, want in (
        ("act_fn", "silu"),
        ("out_channels", found["in_channels"]),
        ("use_post_quant_conv", found["use_quant_conv"]),
        ("latents_mean", None),
        ("latents_std", None),
        ("down_block_types", ["DownEncoderBlock2D"] * len(widths)),
        ("up_block_types", ["UpDecoderBlock2D"] * len(widths)),
    ):
        given = values.get(name, want)
        if (list(given) if isinstance(given, tuple | list) else given) != want:
            raise UserError(
                f"config.json: {name} = {given!r}: only {want!r} is known for this AutoencoderKL"
            )
    try:
        return VAEConfig(**found)
    except TypeError as error:
        raise UserError(f"config.json: a field has the wrong type: {error}") from None


def config_to_json(config: VAEConfig) -> dict:
    """VAEConfig → a config.json that diffusers opens."""
    levels = len(config.block_out_channels)
    found: dict[str, Any] = {name: getattr(config, ours) for name, (ours, _) in _FIELDS.items()}
    found |= {
        "_class_name": CLASS_NAME,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "out_channels": config.in_channels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.use_quant_conv,
    }
    if not config.shift_factor:
        del found["shift_factor"]
    return dict(sorted(found.items()))

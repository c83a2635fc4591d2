"""AutoencoderKL as diffusers stores it, and its config.json."""

from __future__ import annotations

from collections.abc import Container, Mapping

from pixart_jax.errors import UserError
from pixart_jax.models.configs import VAEConfig
from pixart_jax.weights.table import ParamMapping

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


def diffusers(config: VAEConfig) -> tuple[ParamMapping, ...]:
    """The table for a config, with an entry for each level and layer, which differ in shape."""
    levels = len(config.block_out_channels)
    entries: list[ParamMapping] = []
    for half, level_name, blocks, layers in (
        ("encoder", "down", "down_blocks", config.layers_per_block),
        ("decoder", "up", "up_blocks", config.layers_per_block + 1),
    ):
        entries += _conv(f"{half}/conv_in/conv", f"{half}.conv_in")
        for level in range(levels):
            for i in range(layers):
                entries += _residual(
                    f"{half}/{level_name}_{level}_resnet_{i}",
                    f"{half}.{blocks}.{level}.resnets.{i}",
                )
            path = f"{half}/{level_name}_{level}_{level_name}sample/conv"
            entries += _conv(path, f"{half}.{blocks}.{level}.{level_name}samplers.0.conv")
        for i in range(2):
            entries += _residual(f"{half}/mid/resnet_{i}", f"{half}.mid_block.resnets.{i}")
        entries += _norm(f"{half}/mid/attention/norm", f"{half}.{_ATTENTION}.group_norm")
        for ours, theirs in zip(("query", "key", "value", "out"), _PROJECTIONS, strict=True):
            path = f"{half}/mid/attention/{ours}"
            entries += _conv(path, f"{half}.{_ATTENTION}.{theirs}", "linear")
        entries += _norm(f"{half}/norm_out", f"{half}.conv_norm_out")
        entries += _conv(f"{half}/conv_out/conv", f"{half}.conv_out")
    entries += _conv("quant", "quant_conv", "pointwise")
    entries += _conv("post_quant", "post_quant_conv", "pointwise")
    return tuple(entries)


def _conv(ours: str, theirs: str, layout: str = "conv") -> list[ParamMapping]:
    return [
        ParamMapping(f"{ours}/kernel", f"{theirs}.weight", layout),
        ParamMapping(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _norm(ours: str, theirs: str) -> list[ParamMapping]:
    return [
        ParamMapping(f"{ours}/scale", f"{theirs}.weight"),
        ParamMapping(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _residual(ours: str, theirs: str) -> list[ParamMapping]:
    return [
        *_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *_conv(f"{ours}/conv1/conv", f"{theirs}.conv1"),
        *_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *_conv(f"{ours}/conv2/conv", f"{theirs}.conv2"),
        *_conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut", "pointwise"),
    ]


def table(config: VAEConfig, values: Mapping, keys: Container[str] = ()) -> tuple:
    """(the entries, keys to ignore) of the weights beside a config.json of these values."""
    return diffusers(config), ()


def config_from_json(values: Mapping) -> VAEConfig:
    """diffusers' config.json → VAEConfig. UserError for another architecture."""
    widths = tuple(values.get("block_out_channels", (64,)))
    quant = values.get("use_quant_conv", True)
    for name, want in (
        ("act_fn", "silu"),
        ("out_channels", values.get("in_channels", 3)),
        ("use_post_quant_conv", quant),
        ("latents_mean", None),
        ("latents_std", None),
        ("down_block_types", ["DownEncoderBlock2D"] * len(widths)),
        ("up_block_types", ["UpDecoderBlock2D"] * len(widths)),
    ):
        found = values.get(name, want)
        if (list(found) if isinstance(found, tuple | list) else found) != want:
            raise UserError(
                f"config.json: {name} = {found!r}: only {want!r} is known for this AutoencoderKL"
            )
    try:
        return VAEConfig(
            in_channels=values.get("in_channels", 3),
            latent_channels=values.get("latent_channels", 4),
            block_out_channels=widths,
            layers_per_block=values.get("layers_per_block", 1),
            norm_num_groups=values.get("norm_num_groups", 32),
            scaling_factor=values.get("scaling_factor", 0.18215),
            shift_factor=values.get("shift_factor") or 0.0,
            use_quant_conv=quant,
            mid_block_attention=values.get("mid_block_add_attention", True),
            sample_size=values.get("sample_size", 32),
        )
    except TypeError as error:
        raise UserError(f"config.json: a field has the wrong type: {error}") from None


def config_to_json(config: VAEConfig) -> dict:
    """VAEConfig → a config.json that diffusers opens."""
    levels = len(config.block_out_channels)
    return {
        "_class_name": CLASS_NAME,
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": config.in_channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_attention,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": config.in_channels,
        "sample_size": config.sample_size,
        "scaling_factor": config.scaling_factor,
        **({"shift_factor": config.shift_factor} if config.shift_factor else {}),
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": config.use_quant_conv,
        "use_quant_conv": config.use_quant_conv,
    }

"""A ControlNet in files: the names of diffusers' research folder, which our component folders use
too, and of the official .pth, which holds the frozen base beside it."""

from __future__ import annotations

from collections.abc import Container, Mapping

from pixart_jax.errors import UserError
from pixart_jax.models.configs import SIZES, ControlNetConfig
from pixart_jax.weights import transformer
from pixart_jax.weights.files import Tensors
from pixart_jax.weights.table import ParamMapping, layer

# config.json's _class_name: of diffusers' research code, whose blocks are XL/2's, and of
# SimpleTuner's, which has fields for the sizes
CLASS_NAME, SIZED_CLASS_NAME = ("PixArtControlNetAdapterModel", "PixArtSigmaControlNetAdapterModel")
OFFICIAL_ANCHOR = "controlnet.0.before_proj.weight"
ANCHORS = (OFFICIAL_ANCHOR, "controlnet_blocks.0.before_proj.weight")
BASE = "base_model."  # of the frozen base's names in an official file
IGNORED_PREFIXES = (BASE,)


def _table(model: tuple[ParamMapping, ...], theirs: str, copy: str) -> tuple[ParamMapping, ...]:
    """model: the transformer's. theirs: what a unit's names begin with; copy: its block's."""
    blocks = tuple(
        ParamMapping(
            entry.path.replace("blocks/", "units/block/", 1),
            f"{theirs}.{{i}}.{copy}.{entry.key.partition('{i}.')[2]}",
            entry.layout,
            entry.part,
        )
        for entry in model
        if entry.path.startswith("blocks/")
    )
    before, after = f"{theirs}.0.before_proj", f"{theirs}.{{i}}.after_proj"
    return (*blocks, *layer("units/after", after), *layer("before", before))


DIFFUSERS = _table(transformer.DIFFUSERS, "controlnet_blocks", "transformer_block")
OFFICIAL = _table(transformer.OFFICIAL, "controlnet", "copied_block")


def table(config: ControlNetConfig, values: Mapping, keys: Container[str] = ()) -> tuple:
    """(the entries, keys to ignore) of the weights. keys: of the file."""
    return (OFFICIAL if OFFICIAL_ANCHOR in keys else DIFFUSERS), ()


def config_to_json(config: ControlNetConfig) -> dict:
    """Our config → a config.json; without sizes where they are those of diffusers' code."""
    data = {"_class_name": CLASS_NAME, "num_layers": config.depth}
    if (config.width, config.heads) != (1152, 16):
        data |= {
            "_class_name": SIZED_CLASS_NAME,
            "num_attention_heads": config.heads,
            "attention_head_dim": config.width // config.heads,
            "cross_attention_dim": config.width,
        }
    if config.mlp_ratio != 4.0:
        data["mlp_ratio"] = config.mlp_ratio
    if config.qk_norm:
        data["qk_norm"] = "layer_norm_across_heads"
    return data


def config_from_json(data: Mapping) -> ControlNetConfig:
    """A config.json → our config; diffusers' sizes where it has none."""
    heads, head = data.get("num_attention_heads", 16), data.get("attention_head_dim", 72)
    cross = data.get("cross_attention_dim", heads * head)
    if cross != heads * head:
        raise UserError(
            f"config.json: cross_attention_dim = {cross!r}: want the width, {heads * head}"
        )
    return ControlNetConfig(
        data.get("num_layers", 13),
        heads * head,
        heads,
        float(data.get("mlp_ratio", 4.0)),
        data.get("qk_norm") == "layer_norm_across_heads",
    )


def config_of_tensors(tensors: Tensors, heads: int | None = None) -> dict:
    """The config.json of a file of either layout. heads: needed for widths other than the released
    models'. Raises UserError without them, and for tensors of another kind of block."""
    official = OFFICIAL_ANCHOR in tensors
    first, hidden, norm = (
        ("controlnet", "copied_block.mlp.fc1", "attn.q_norm")
        if official
        else ("controlnet_blocks", "transformer_block.ff.net.0.proj", "attn1.norm_q")
    )
    width = tensors.shape(ANCHORS[not official])[0]
    units = [int(key.split(".")[1]) for key in tensors if key.startswith(f"{first}.")]
    heads = heads or {w: k for _, w, k in SIZES.values()}.get(width)
    if heads is None:
        raise UserError(
            f"{tensors.source}: how many heads at width {width}? convert it with --heads"
        )
    if (fc1 := f"{first}.0.{hidden}.weight") not in tensors:
        raise UserError(f"{tensors.source} is no ControlNet of a PixArt: it has no {fc1}")
    ratio = tensors.shape(fc1)[0] / width
    qk_norm = any(norm in key for key in tensors)
    return config_to_json(ControlNetConfig(max(units) + 1, width, heads, ratio, qk_norm))

"""The PixArt transformer in released files: diffusers' and the official names and configs."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.models.configs import SIZES, BackboneConfig, TransformerConfig
from pixart_jax.models.embedders import sincos_2d
from pixart_jax.weights.table import ParamMapping, layer, write

CLASS_NAME = "PixArtTransformer2DModel"  # config.json's _class_name
# keys that every such file has, by which select() finds the names' prefix
OFFICIAL_ANCHORS = ("x_embedder.proj.weight", "final_layer.linear.weight")
DIFFUSERS_ANCHORS = ("pos_embed.proj.weight", "adaln_single.linear.weight")
ANCHORS = OFFICIAL_ANCHORS + DIFFUSERS_ANCHORS
SIGMA_TOKENS = 300  # of a PixArt-Σ caption; a PixArt-α caption has 120


_EMB, _D, _O = "adaln_single.emb", "transformer_blocks.{i}", "blocks.{i}"
# Linears: our path, diffusers' name, the official name, and the part of the official tensor
LINEARS: tuple[tuple, ...] = (
    ("timestep_embedder/fc1", f"{_EMB}.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("timestep_embedder/fc2", f"{_EMB}.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("size_embedder/fc1", f"{_EMB}.resolution_embedder.linear_1", "csize_embedder.mlp.0"),
    ("size_embedder/fc2", f"{_EMB}.resolution_embedder.linear_2", "csize_embedder.mlp.2"),
    ("ratio_embedder/fc1", f"{_EMB}.aspect_ratio_embedder.linear_1", "ar_embedder.mlp.0"),
    ("ratio_embedder/fc2", f"{_EMB}.aspect_ratio_embedder.linear_2", "ar_embedder.mlp.2"),
    ("t_block", "adaln_single.linear", "t_block.1"),
    ("caption_projection/fc1", "caption_projection.linear_1", "y_embedder.y_proj.fc1"),
    ("caption_projection/fc2", "caption_projection.linear_2", "y_embedder.y_proj.fc2"),
    ("blocks/attn/q", f"{_D}.attn1.to_q", f"{_O}.attn.qkv", (0, 3)),
    ("blocks/attn/k", f"{_D}.attn1.to_k", f"{_O}.attn.qkv", (1, 3)),
    ("blocks/attn/v", f"{_D}.attn1.to_v", f"{_O}.attn.qkv", (2, 3)),
    ("blocks/attn/out", f"{_D}.attn1.to_out.0", f"{_O}.attn.proj"),
    ("blocks/cross_attn/q", f"{_D}.attn2.to_q", f"{_O}.cross_attn.q_linear"),
    ("blocks/cross_attn/k", f"{_D}.attn2.to_k", f"{_O}.cross_attn.kv_linear", (0, 2)),
    ("blocks/cross_attn/v", f"{_D}.attn2.to_v", f"{_O}.cross_attn.kv_linear", (1, 2)),
    ("blocks/cross_attn/out", f"{_D}.attn2.to_out.0", f"{_O}.cross_attn.proj"),
    ("blocks/mlp/fc1", f"{_D}.ff.net.0.proj", f"{_O}.mlp.fc1"),
    ("blocks/mlp/fc2", f"{_D}.ff.net.2", f"{_O}.mlp.fc2"),
    ("final", "proj_out", "final_layer.linear"),
)
# other tensors: our path, diffusers' name, the official name
TENSORS = (
    ("patch_embedder/kernel", "pos_embed.proj.weight", "x_embedder.proj.weight"),
    ("patch_embedder/bias", "pos_embed.proj.bias", "x_embedder.proj.bias"),
    ("null_caption", "caption_projection.y_embedding", "y_embedder.y_embedding"),
    ("blocks/table", f"{_D}.scale_shift_table", f"{_O}.scale_shift_table"),
    ("blocks/attn/q_norm/scale", f"{_D}.attn1.norm_q.weight", f"{_O}.attn.q_norm.weight"),
    ("blocks/attn/q_norm/bias", f"{_D}.attn1.norm_q.bias", f"{_O}.attn.q_norm.bias"),
    ("blocks/attn/k_norm/scale", f"{_D}.attn1.norm_k.weight", f"{_O}.attn.k_norm.weight"),
    ("blocks/attn/k_norm/bias", f"{_D}.attn1.norm_k.bias", f"{_O}.attn.k_norm.bias"),
    ("final_table", "scale_shift_table", "final_layer.scale_shift_table"),
)


def tables(
    linears: Iterable[tuple], tensors: Iterable[tuple[str, str, str]]
) -> tuple[tuple[ParamMapping, ...], tuple[ParamMapping, ...]]:
    """(diffusers' table, the official one) of rows like LINEARS' and TENSORS'."""

    def tensor(path: str, name: str) -> ParamMapping:
        layout = "conv" if path == "patch_embedder/kernel" else "same"
        return ParamMapping(path, name, layout, optional=path == "null_caption")

    diffusers: list[ParamMapping] = []
    official: list[ParamMapping] = []
    for path, theirs, name, *part in linears:
        diffusers += layer(path, theirs)
        official += layer(path, name, "linear", *part)
    for path, theirs, name in tensors:
        diffusers.append(tensor(path, theirs))
        official.append(tensor(path, name))
    return tuple(diffusers), tuple(official)


DIFFUSERS, OFFICIAL = tables(LINEARS, TENSORS)
# the position table, which is computed, and counters that averaging wrappers store
BOOKKEEPING = ("n_averaged", "num_updates", "decay")
DIFFUSERS_IGNORE = ("pos_embed.pos_embed", *BOOKKEEPING)
OFFICIAL_IGNORE = ("pos_embed", *BOOKKEEPING)


def _compression(config: TransformerConfig, conv: str, norm: str) -> tuple[ParamMapping, ...]:
    """The entries of key and value compression; none in a model without."""
    if config.kv_compression == 1:
        return ()
    rows = (
        ("kernel", f"{conv}.weight", "conv"),
        ("bias", f"{conv}.bias", "same"),
        ("norm_scale", f"{norm}.weight", "same"),
        ("norm_bias", f"{norm}.bias", "same"),
    )
    layers = config.kv_compression_layers
    return tuple(
        ParamMapping(f"kv_compression/{path}", name, layout, layers=layers)
        for path, name, layout in rows
    )


def diffusers(config: TransformerConfig) -> tuple[ParamMapping, ...]:
    """The table of a component folder: diffusers' names and ours for key and value compression."""
    return DIFFUSERS + _compression(config, f"{_D}.attn1.sr", f"{_D}.attn1.sr_norm")


def table(config: TransformerConfig, values: Mapping, keys: Container[str] = ()) -> tuple:
    """(the entries, keys to ignore) of the weights beside a config.json of these values. keys: of
    the file, which may have the official names."""
    if OFFICIAL_ANCHORS[0] in keys:
        return official(config), OFFICIAL_IGNORE
    return diffusers(config), DIFFUSERS_IGNORE


def official(config: TransformerConfig) -> tuple[ParamMapping, ...]:
    """The table of the official code's files."""
    return OFFICIAL + _compression(config, f"{_O}.attn.sr", f"{_O}.attn.norm")


def to_official(config: TransformerConfig, params: Mapping) -> dict[str, np.ndarray]:
    """Our tree → {the official code's key: array}, complete for its strict loading."""
    return {"pos_embed": position_table(config), **write(official(config), params)}


def position_table(config: BackboneConfig) -> np.ndarray:
    """[1, n, d] fp32: the position buffer of the official models, of a square grid."""
    side = config.sample_size // config.patch_size
    return sincos_2d(side, side, config.width, config.base, config.position_scale)[None]


# config.json fields of architecture variants, and the values that this model implements
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "norm_type": "ada_norm_single",
}


def backbone_from_diffusers(
    data: Mapping, fixed: Mapping, sample_size: int, out_channels: int | None
) -> dict:
    """The fields of a BackboneConfig in a diffusers config.json, with diffusers' defaults.
    UserError where a field of ``fixed`` has another value: another architecture."""
    for field, only in fixed.items():
        if data.get(field, only) != only:
            raise UserError(f"config.json: {field} = {data[field]!r}: only {only!r} is known")
    heads, channels = data.get("num_attention_heads", 16), data.get("in_channels", 4)
    out = data.get("out_channels", out_channels)
    return {
        "depth": data.get("num_layers", 28),
        "width": heads * data.get("attention_head_dim", 72),
        "heads": heads,
        "patch_size": data.get("patch_size", 2),
        "in_channels": channels,
        "out_channels": channels if out is None else out,
        "sample_size": data.get("sample_size", sample_size),
    }


def config_from_json(data: Mapping) -> TransformerConfig:
    """A diffusers config.json → our config. UserError for another variant of the architecture."""
    try:
        fields = backbone_from_diffusers(data, _FIXED, sample_size=128, out_channels=8)
        sample, width = fields["sample_size"], fields["width"]
        scale, conditions = data.get("interpolation_scale"), data.get("use_additional_conditions")
        captions, cross = data.get("caption_channels"), data.get("cross_attention_dim", 1152)
        if captions is None or cross != width:
            raise UserError(
                f"config.json: caption_channels = {captions!r} and cross_attention_dim = "
                f"{cross!r}: want the text encoder's width and the model's own, {width}"
            )
        return TransformerConfig(
            **fields,
            mlp_ratio=float(data.get("mlp_ratio", 4.0)),
            position_scale=float(max(sample // 64, 1) if scale is None else scale),
            caption_width=captions,
            text_tokens=data.get("text_tokens", 120),
            size_conditions=sample == 128 if conditions is None else bool(conditions),
            qk_norm=data.get("qk_norm") == "layer_norm_across_heads",
            kv_compression=data.get("kv_compression", 1),
            kv_compression_layers=tuple(data.get("kv_compression_layers", ())),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json: a field has the wrong type: {error}") from None


def looks_like_sigma(config: TransformerConfig) -> bool:
    """Only PixArt-Σ's are of 1024 px without size conditions, or compress keys and values."""
    return config.kv_compression > 1 or (config.sample_size >= 128 and not config.size_conditions)


def config_to_json(config: TransformerConfig) -> dict:
    """Our config → a config.json that diffusers opens; fields that diffusers lacks are written only
    where they differ from its model.

    diffusers' position base is sample_size / patch_size; another base is expressed by the scale.
    """
    side = config.sample_size // config.patch_size
    data = {
        "_class_name": CLASS_NAME,
        "num_layers": config.depth,
        "num_attention_heads": config.heads,
        "attention_head_dim": config.head_dim,
        "cross_attention_dim": config.width,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "sample_size": config.sample_size,
        "interpolation_scale": config.position_scale * side / config.base,
        "use_additional_conditions": config.size_conditions,
        "caption_channels": config.caption_width,
        "num_embeds_ada_norm": 1000,
        "dropout": 0.0,
        **_FIXED,
    }
    if config.mlp_ratio != 4.0:
        data["mlp_ratio"] = config.mlp_ratio
    if config.text_tokens != 120 or looks_like_sigma(config):
        data["text_tokens"] = config.text_tokens
    if config.qk_norm:
        data["qk_norm"] = "layer_norm_across_heads"
    if config.kv_compression > 1:
        data["kv_compression"] = config.kv_compression
        data["kv_compression_layers"] = list(config.kv_compression_layers)
    return data


def official_names(keys: Iterable[str]) -> dict[str, str]:
    """{official name: key} of keys under diffusers' names; of a fused tensor each part."""
    of = {their: official for _, their, official, *_ in LINEARS}
    of |= {their: official for _, their, official in TENSORS} | {"pos_embed.pos_embed": "pos_embed"}
    names = {}
    for key in keys:
        general = re.sub(r"^transformer_blocks\.(\d+)", "transformer_blocks.{i}", key)
        stem, _, last = general.rpartition(".")
        name = of.get(general) or (f"{of[stem]}.{last}" if stem in of else key)
        names[name.format(i=key.split(".")[1]) if "{i}" in name else name] = key
    return names


def position_scale_of(pos_embed: np.ndarray) -> float | None:
    """The scale of a stored position table [1, n, d] of a square grid; None for fewer than two
    places. The second place has coordinate 1 / scale; channels 0 and d/4 are the fastest."""
    places = np.asarray(pos_embed, np.float64).reshape(-1, pos_embed.shape[-1])
    if len(places) < 2:
        return None
    angle = np.arctan2(places[1, 0], places[1, places.shape[1] // 4])
    return float(round(1.0 / angle, 5)) if angle > 0 else None


def official_geometry(
    shapes: Mapping[str, tuple[int, ...]],
    pos_embed: np.ndarray | None,
    heads: int | None,
    sample_size: int | None,
) -> dict:
    """The fields of a BackboneConfig, from the shapes in an official PixArt or DiT file."""
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        depth = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks."))
        mlp, out = shapes["blocks.0.mlp.fc1.weight"][0], shapes["final_layer.linear.weight"][0]
    except (KeyError, ValueError):
        raise UserError(
            "not an official PixArt or DiT file: x_embedder, blocks.0.mlp or final_layer is missing"
        ) from None
    if heads is None:
        known = {width: heads for _, width, heads in SIZES.values()}
        if width not in known:
            raise UserError(
                f"the file does not say how many heads a model of width {width} has: give --heads"
            )
        heads = known[width]
    if pos_embed is not None:
        side = int(round(pos_embed.shape[1] ** 0.5)) * patch
        if sample_size not in (None, side):
            raise UserError(
                f"--sample-size {sample_size}: the file's own position table is of {side}"
            )
        sample_size = side
    if sample_size is None:
        raise UserError(
            "the file holds no pos_embed: give --sample-size, its pixels / 8 (32, 64, 128 or 256)"
        )
    return {
        "depth": depth,
        "width": width,
        "heads": heads,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": out // patch**2,
        "mlp_ratio": mlp / width,
        "sample_size": sample_size,
    }


def _official_compression(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """The fields of key and value compression, from the official convolutions [d, 1, R, R]."""
    suffix = ".attn.sr.weight"
    ratios = {
        int(key.split(".")[1]): shape[-1]
        for key, shape in shapes.items()
        if key.startswith("blocks.") and key.endswith(suffix)
    }
    if not ratios:
        return {}
    if len(set(ratios.values())) > 1:
        raise UserError("layers of several ratios of key and value compression are not supported")
    return {
        "kv_compression": next(iter(ratios.values())),
        "kv_compression_layers": tuple(sorted(ratios)),
    }


def config_from_official(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    pos_embed: np.ndarray | None = None,
    heads: int | None = None,
    position_scale: float | None = None,
    sample_size: int | None = None,
    text_tokens: int | None = None,
) -> TransformerConfig:
    """The config of an official file, from its tensors' names and shapes.

    pos_embed: the file's position table [1, n, d], which gives sample_size and position_scale.
    Without it the multi-scale model is taken as the 1024 px one, and others need sample_size; the
    scale is then sample_size / 64 for PixArt-Σ (300 tokens), and for PixArt-α the same, but 1 at
    256 px. heads: needed for widths other than DiT's and PixArt's. text_tokens: where the file has
    no null caption; 120 by default. UserError for missing or contrary values.
    """
    multi_scale = "csize_embedder.mlp.0.weight" in shapes
    if sample_size is None and pos_embed is None and multi_scale:
        sample_size = 128
    geometry = official_geometry(shapes, pos_embed, heads, sample_size)
    null = shapes.get("y_embedder.y_embedding")
    if null and text_tokens not in (None, null[0]):
        raise UserError(
            f"--tokens {text_tokens}: the file's own null caption is of {null[0]} tokens"
        )
    tokens = null[0] if null else 120 if text_tokens is None else text_tokens
    if position_scale is None and pos_embed is not None:
        position_scale = position_scale_of(pos_embed)
    if position_scale is None:
        position_scale = (
            geometry["sample_size"] / 64
            if tokens == SIGMA_TOKENS
            else float(max(geometry["sample_size"] // 64, 1))
        )
    return TransformerConfig(
        **geometry,
        position_scale=position_scale,
        caption_width=shapes["y_embedder.y_proj.fc1.weight"][1],
        text_tokens=tokens,
        size_conditions=multi_scale,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        **_official_compression(shapes),
    )

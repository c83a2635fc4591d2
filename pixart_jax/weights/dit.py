"""The class-conditional DiT in files: the names of the official .pt, which our component folders
use too, and of diffusers' safetensors; and their configs."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping

import numpy as np

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.configs import DiTConfig
from pixart_jax.weights import transformer
from pixart_jax.weights.table import write
from pixart_jax.weights.transformer import OFFICIAL_ANCHORS

CLASS_NAME = "DiT"  # config.json's _class_name in a folder that this project saved
DIFFUSERS_CLASS_NAME = "DiTTransformer2DModel"
ANCHORS = (*OFFICIAL_ANCHORS, "pos_embed.proj.weight", "proj_out_2.weight")

_EMB, _D = "transformer_blocks.0.norm1.emb", "transformer_blocks.{i}"
_SHARED = ("patch_embedder/", "blocks/attn/", "blocks/mlp/")  # named as the PixArt transformer's
_LINEARS = (
    ("timestep_embedder/fc1", f"{_EMB}.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("timestep_embedder/fc2", f"{_EMB}.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("blocks/modulation", f"{_D}.norm1.linear", "blocks.{i}.adaLN_modulation.1"),
    ("final_modulation", "proj_out_1", "final_layer.adaLN_modulation.1"),
    ("final", "proj_out_2", "final_layer.linear"),
    *(row for row in transformer.LINEARS if row[0].startswith(_SHARED)),
)
_LABELS = "class_embedder.embedding_table.weight"
_TENSORS = (
    ("label_embedder/table", f"{_EMB}.{_LABELS}", "y_embedder.embedding_table.weight"),
    *(row for row in transformer.TENSORS if row[0].startswith(_SHARED[0])),
)
# diffusers' names are for reading only: it stores a copy of the timestep and label embedders in
# every block and computes with block 0's. Its model differs from the official one in the sinusoid
# (an exponent divided by 127 instead of 128) and an epsilon (1e-5); ours computes as the official
# one, which the weights were trained with.
DIFFUSERS, OFFICIAL = transformer.tables(_LINEARS, _TENSORS)
OFFICIAL_IGNORE = transformer.OFFICIAL_IGNORE
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}


def diffusers_ignore(depth: int) -> tuple[str, ...]:
    """The copies of the embedders in blocks 1 … depth − 1, and a stored position table."""
    copies = [f"timestep_embedder.linear_{n}.{part}" for n in (1, 2) for part in ("weight", "bias")]
    copies.append(_LABELS)
    return (
        *transformer.DIFFUSERS_IGNORE,
        *(f"transformer_blocks.{i}.norm1.emb.{copy}" for i in range(1, depth) for copy in copies),
    )


def table(config: DiTConfig, values: Mapping, keys: Container[str] = ()) -> tuple:
    """(the entries, keys to ignore) of the weights beside a config.json of these values. keys: of
    the file, which may have the official names in any case."""
    if values.get("_class_name") == DIFFUSERS_CLASS_NAME and OFFICIAL_ANCHORS[0] not in keys:
        return DIFFUSERS, diffusers_ignore(config.depth)
    return OFFICIAL, OFFICIAL_IGNORE


def to_official(config: DiTConfig, params: Mapping) -> dict[str, np.ndarray]:
    """Our tree → {the official code's key: array}, complete for its strict loading."""
    return {"pos_embed": transformer.position_table(config), **write(OFFICIAL, params)}


def config_to_json(config: DiTConfig) -> dict:
    """Our config → the config.json of a component folder: the dataclass's own fields."""
    return {"_class_name": CLASS_NAME, **dataclasses.asdict(config)}


def config_from_json(data: Mapping) -> DiTConfig:
    """A config.json of ours, or of a DiT in diffusers → our config."""
    try:
        if data.get("_class_name") == DIFFUSERS_CLASS_NAME:
            fields = transformer.backbone_from_diffusers(data, _FIXED, 32, out_channels=None)
            return DiTConfig(**fields, num_classes=data.get("num_embeds_ada_norm", 1000))
        known = {field.name for field in dataclasses.fields(DiTConfig)}
        given = {key: value for key, value in data.items() if not key.startswith("_")}
        for key in given.keys() - known:
            raise UserError(f"config.json: {key!r} is no field of a DiT{nearest(key, known)}")
        return DiTConfig(**given)
    except TypeError as error:
        raise UserError(f"config.json: a field has the wrong type: {error}") from None


def config_from_official(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    pos_embed: np.ndarray | None = None,
    heads: int | None = None,
    sample_size: int | None = None,
) -> DiTConfig:
    """The config of an official .pt, from its tensors' names and shapes; as the transformer's."""
    geometry = transformer.official_geometry(shapes, pos_embed, heads, sample_size)
    try:
        rows = shapes["y_embedder.embedding_table.weight"][0]
    except KeyError:
        raise UserError("not an official DiT file: y_embedder.embedding_table is missing") from None
    return DiTConfig(**geometry, num_classes=rows - 1)

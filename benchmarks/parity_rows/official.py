"""PixArt's and DiT's weights under the names of their official .pth and .pt files, renamed from
diffusers' by rules written out here.

Written apart from the tables in pixart_jax/weights, so that a row of the table checks these.
"""

from __future__ import annotations

from pathlib import Path

_TRANSFORMER = {  # old name: new name
    "pos_embed.proj": "x_embedder.proj",
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "proj_out": "final_layer.linear",
}
_BLOCK = {  # new name: the old ones, stacked along their first axis
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
_DIT = {
    "pos_embed.proj": "x_embedder.proj",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def converted(file: Path, flags: tuple[str, ...] = ()):
    """An official file as a component, through ``python -m pixart_jax convert``, as users do."""
    from pixart_jax import load_component
    from pixart_jax.commands import convert

    folder = file.with_name("converted")
    convert.main([str(file), str(folder), *flags])
    return load_component(folder)


def transformer(state: dict, depth: int) -> dict:
    """A diffusers PixArt state dict under the official names. Empties ``state``, so that no tensor
    is held twice."""
    out = {}
    for old, new in _TRANSFORMER.items():
        _move(state, (old,), out, new)
    out["final_layer.scale_shift_table"] = state.pop("scale_shift_table")
    for i in range(depth):
        out[f"blocks.{i}.scale_shift_table"] = state.pop(
            f"transformer_blocks.{i}.scale_shift_table"
        )
        _move_block(state, i, out)
    return _all_of(state, out)


def dit(state: dict, depth: int) -> dict:
    """A diffusers DiT state dict under the official names; ``state`` is emptied."""
    out = {}
    for old, new in _DIT.items():
        _move(state, (old,), out, new)
    table = "norm1.emb.class_embedder.embedding_table.weight"
    out["y_embedder.embedding_table.weight"] = state.pop(f"transformer_blocks.0.{table}")
    for i in range(depth):
        _move_block(state, i, out)
        _move(
            state, (f"transformer_blocks.{i}.norm1.linear",), out, f"blocks.{i}.adaLN_modulation.1"
        )
        for key in [key for key in state if key.startswith(f"transformer_blocks.{i}.norm1.emb.")]:
            del state[key]  # copies of block 0's
    return _all_of(state, out)


def _move_block(state: dict, i: int, out: dict) -> None:
    for new, old in _BLOCK.items():
        _move(
            state, tuple(f"transformer_blocks.{i}.{name}" for name in old), out, f"blocks.{i}.{new}"
        )


def _move(state: dict, old: tuple[str, ...], out: dict, new: str) -> None:
    import torch

    for part in ("weight", "bias"):
        if f"{old[0]}.{part}" in state:
            values = [state.pop(f"{name}.{part}") for name in old]
            out[f"{new}.{part}"] = values[0] if len(values) == 1 else torch.cat(values)


def _all_of(state: dict, out: dict) -> dict:
    if state:
        raise ValueError(f"without an official name: {', '.join(sorted(state)[:4])}")
    return out

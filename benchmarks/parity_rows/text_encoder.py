"""Rows of the T5 encoder beside transformers' T5EncoderModel; T5-XXL in a slice of two layers, and
whole, one layer at a time."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from benchmarks.parity_rows.row import Outputs, Row
from benchmarks.parity_rows.weights import draw, materialised

_V11 = {
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "is_encoder_decoder": False,
    "use_cache": False,
}
TINY = dict(vocab_size=97, d_model=24, d_kv=16, d_ff=40, num_layers=3, num_heads=4, **_V11)
XXL = dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, **_V11)
SLICE = XXL | {"num_layers": 2}
LENGTHS = (300, 37)  # the longest caption of PixArt-Σ, and past the last bucket of distances


def inputs(fields: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids [b, l], lengths [b], which of [b, l] count)."""
    ids = np.random.default_rng(2).integers(0, fields["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    lengths = np.array(LENGTHS)
    return ids, lengths, np.arange(ids.shape[1]) < lengths[:, None]


# ---- theirs ----


def build(fields: dict):
    from transformers import T5Config, T5EncoderModel

    model = materialised(lambda: T5EncoderModel(T5Config(**fields)), t5_head=fields["d_kv"])
    model.encoder.embed_tokens.weight = model.shared.weight  # one table under two names
    return model


def theirs(fields: dict, write, folder: Path) -> Outputs:
    """The reference on its own weights; write(model, folder) leaves them in the row's format."""
    import torch

    model = build(fields)
    (folder / "t5").mkdir()
    write(model, folder / "t5")
    (folder / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", **fields}))
    ids, _, counts = inputs(fields)
    mask = torch.from_numpy(counts).long()

    with torch.no_grad():
        states = model(torch.from_numpy(ids), attention_mask=mask).last_hidden_state
    return {"states": states.numpy()[counts]}


def write_safetensors(shard: str, model, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=shard)


def write_bin(shards: int, model, folder: Path) -> None:
    """pytorch_model.bin files behind an index, as transformers wrote them before safetensors: both
    names of the table stored."""
    import torch

    state = dict(model.state_dict())
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin" for n in range(shards)]
    where = {key: names[i * shards // len(state)] for i, key in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key in state if where[key] == name}, folder / name)
    write_index(folder / "pytorch_model.bin.index.json", where)


def write_index(path: Path, where: dict[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def layer_by_layer(fields: dict, folder: Path) -> Outputs:
    """The whole encoder with the memory of one layer: bf16 weights are drawn, written and run in
    fp32, a layer at a time, each a T5EncoderModel of one layer on the states so far. All have the
    bias of the distances, which transformers keeps in the first layer; the last has the final
    norm."""
    import safetensors.torch
    import torch
    from transformers import T5Config, T5EncoderModel

    target, where = folder / "t5", {}
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"model_type": "t5", **fields}))

    def write_shard(shapes: dict[str, tuple[int, ...]], seed: int, shard: str) -> dict:
        tensors = {key: torch.empty(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
        draw(tensors.items(), seed, t5_head=fields["d_kv"])
        safetensors.torch.save_file(tensors, target / shard, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, shard))
        return tensors

    ids, _, counts = inputs(fields)
    mask = torch.from_numpy(counts).long()
    last = fields["num_layers"] - 1
    names = [f"model-{n + 1:05d}-of-{last + 2:05d}.safetensors" for n in range(last + 2)]
    table = {"shared.weight": (fields["vocab_size"], fields["d_model"])}
    states = write_shard(table, 0, names[0])["shared.weight"][torch.from_numpy(ids)].float()
    with torch.no_grad():
        layer = T5EncoderModel(T5Config(**fields | {"num_layers": 1, "vocab_size": 1})).eval()
        final_norm = layer.encoder.final_layer_norm
        layer.encoder.final_layer_norm = torch.nn.Identity()
        block = layer.encoder.block.state_dict()
        for i in range(last + 1):
            wanted = {
                f"encoder.block.{i}.{key[2:]}": tuple(value.shape)
                for key, value in block.items()
                if i == 0 or "relative_attention_bias" not in key
            }
            if i == last:
                wanted["encoder.final_layer_norm.weight"] = (fields["d_model"],)
            tensors = write_shard(wanted, i + 1, names[i + 1])
            if i == last:
                final_norm.weight.copy_(tensors.pop("encoder.final_layer_norm.weight"))
                layer.encoder.final_layer_norm = final_norm
            for key, tensor in tensors.items():  # into the one layer; the bias of layer 0 stays
                layer.get_parameter(key.replace(f"block.{i}.", "block.0.")).copy_(tensor)
            del tensors
            states = layer(inputs_embeds=states, attention_mask=mask).last_hidden_state
    write_index(target / "model.safetensors.index.json", where)
    return {"states": states.numpy()[counts]}


# ---- ours ----


def ours(fields: dict, dtype: str, folder: Path) -> Outputs:
    """dtype: 'float32', 'bfloat16', or 'bfloat16 held': bf16 parameters, fp32 arithmetic."""
    import jax.numpy as jnp

    from pixart_jax import load_component

    part = load_component(folder / "t5", dtype=dtype.removesuffix(" held"))
    if dtype.endswith("held"):
        part = part.replace(dtype=jnp.float32)
    ids, lengths, counts = inputs(fields)
    return {"states": np.asarray(part.apply(ids, lengths))[counts]}


# ---- the rows ----

_FORMATS = {  # how the reference is written: (format, theirs)
    "safetensors": ("safetensors", theirs, functools.partial(write_safetensors, "10GB")),
    "8KB": ("safetensors, sharded", theirs, functools.partial(write_safetensors, "8KB")),
    "500MB": ("safetensors, sharded", theirs, functools.partial(write_safetensors, "500MB")),
    "bin": (".bin", theirs, functools.partial(write_bin, 1)),
    "3 bins": (".bin, sharded", theirs, functools.partial(write_bin, 3)),
    "4 bins": (".bin, sharded", theirs, functools.partial(write_bin, 4)),
    "layers": ("bf16 safetensors, sharded", layer_by_layer),
}
_BF16 = {"dtype": "bf16", "bound": 2e-2, "measure": "l2"}
_HELD = {"dtype": "fp32, weights held in bf16"}


def _row(name, fields, written, compute="float32", **how) -> Row:
    size = {3: "tiny", 2: "T5-XXL, 2 of 24 layers", 24: "T5-XXL whole"}[fields["num_layers"]]
    format, reference, *write = _FORMATS[written]
    return Row(
        f"t5 {name}",
        "T5 v1.1 encoder",
        format,
        f"{size}, 300 tokens",
        functools.partial(reference, fields, *write),
        functools.partial(ours, fields, compute),
        **how,
    )


ROWS = (
    _row("tiny", TINY, "safetensors"),
    _row("tiny sharded", TINY, "8KB"),
    _row("tiny bin", TINY, "bin"),
    _row("tiny bin sharded", TINY, "3 bins"),
    _row("tiny by layers", TINY, "layers", "bfloat16 held", **_HELD),
    _row("XXL 2 layers", SLICE, "500MB", tier="full"),
    _row("XXL 2 layers bin", SLICE, "4 bins", tier="full"),
    _row("XXL 2 layers bf16", SLICE, "500MB", "bfloat16", tier="full", **_BF16),
    _row("XXL", XXL, "layers", "bfloat16 held", tier="slow", **_HELD),
)

"""LoRA files of other tools, made by peft, by diffusers or from key lists: the merged transformer
equals peft's model."""

from __future__ import annotations

import copy
import functools
import json
import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from pixart_jax.errors import Notice, UserError
from pixart_jax.models import lora as trees
from pixart_jax.weights import lora
from pixart_jax.weights.component import Transformer
from tests.models.reference import diffusers_pair, inputs, relative_error, run_diffusers

# the official scripts' list
TARGETS = "to_k to_q to_v to_out.0 ff.net.0.proj ff.net.2 proj linear linear_1 linear_2 proj_out"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


class WithLora(PixArtTransformer2DModel, PeftAdapterMixin):
    """What diffusers lacks: its PixArt transformer with its LoRA loader."""


@functools.cache
def base(size_conditions: bool = False):
    """(diffusers' transformer with random weights, ours of the same weights); not written to."""
    sizes = {"num_layers": 3, "num_attention_heads": 3, "attention_head_dim": 8, "sample_size": 8}
    sizes |= {"caption_channels": 16, "norm_num_groups": 4}
    theirs, config, params = diffusers_pair(**sizes, use_additional_conditions=size_conditions)
    return theirs, Transformer(config, params)


def adapted(size_conditions: bool = False, seed: int = 1, **options) -> PeftModel:
    """peft's model over a copy of the base, with random adapters that change the output a lot."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS.split(), **options}
    model = get_peft_model(copy.deepcopy(base(size_conditions)[0]), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(generator=generator).mul_(0.15)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def difference(ours: Transformer, theirs, size_conditions: bool = False) -> float:
    """The largest relative difference of both outputs. The adapter must change the output."""
    given = inputs(ours.config, 8, 8, [5, 3])
    out = run_diffusers(theirs, **given)
    assert relative_error(base(size_conditions)[1].apply(**given), out) > 0.05
    return relative_error(ours.apply(**given), out)


@pytest.fixture(autouse=True)
def _no_notice():
    """A file that says its alpha is read without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        yield


# ---- reading ----

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"to_q": 2, "transformer_blocks.1.attn1.to_k": 5},
        "alpha_pattern": {"ff.net.2": 1, "transformer_blocks.[02].attn2.to_v": 20},
    },
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [0, 2]}
    | {"layers_pattern": "transformer_blocks"},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("size_conditions", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_folder_of_peft(tmp_path, options, size_conditions):
    theirs = adapted(size_conditions, **OPTIONS[options])
    theirs.save_pretrained(tmp_path)
    ours = base(size_conditions)[1].with_lora(tmp_path)
    assert difference(ours, theirs, size_conditions) < 1e-4


# layers under diffusers' and the official names, of the file layouts that lack peft's
OFFICIAL = {
    "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "adaln_single.emb.resolution_embedder.linear_1": "csize_embedder.mlp.0",
    "adaln_single.emb.resolution_embedder.linear_2": "csize_embedder.mlp.2",
    "adaln_single.emb.aspect_ratio_embedder.linear_1": "ar_embedder.mlp.0",
    "adaln_single.emb.aspect_ratio_embedder.linear_2": "ar_embedder.mlp.2",
    "adaln_single.linear": "t_block.1",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out": "final_layer.linear",
    "attn1.to_q": "attn.qkv.0",
    "attn1.to_k": "attn.qkv.1",
    "attn1.to_v": "attn.qkv.2",
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    "attn2.to_k": "cross_attn.kv_linear.0",
    "attn2.to_v": "cross_attn.kv_linear.1",
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def official(name: str) -> str:
    if not name.startswith("transformer_blocks."):
        return OFFICIAL[name]
    _, layer, rest = name.split(".", 2)
    return f"blocks.{layer}.{OFFICIAL[rest]}"


def layers(model: PeftModel) -> dict[str, dict[str, torch.Tensor]]:
    """{a layer's name: {A, B[, m]}} of peft's model."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in get_peft_model_state_dict(model).items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        short = {"A.weight": "A", "B.weight": "B", "magnitude_vector": "m"}[part]
        found.setdefault(name, {})[short] = value.contiguous().clone()
    return found


def kohya(model: PeftModel, naming, prefix: str, alpha: float) -> dict[str, torch.Tensor]:
    """Named as Kohya's trainers do, with every layer's alpha."""
    out = {}
    for name, layer in layers(model).items():
        key = f"{prefix}{naming(name)}"
        out |= {f"{key}.lora_down.weight": layer["A"], f"{key}.lora_up.weight": layer["B"]}
        out[f"{key}.alpha"] = torch.tensor(alpha * layer["A"].shape[0] / 4)
        if "m" in layer:
            shape = [-1] + [1] * (layer["A"].ndim - 1)
            out[f"{key}.dora_scale"] = layer["m"].reshape(shape)
    return out


def sorted_layers(model: PeftModel) -> list[tuple[str, dict]]:
    """(official name, layer), q before k before v."""
    named = {official(name): layer for name, layer in layers(model).items()}
    return [(name, named[name]) for name in sorted(named)]


def fused(model: PeftModel, naming, prefix: str, alpha: float) -> dict[str, torch.Tensor]:
    """One adapter for the official qkv and one for kv, whose products are those of their parts."""
    parts: dict[str, list[dict]] = {}
    for own, layer in sorted_layers(model):
        whole = own[:-2] if own[-1].isdigit() and ("qkv" in own or "kv_linear" in own) else own
        parts.setdefault(whole, []).append(layer)
    out = {}
    for whole, found in parts.items():
        key, rank = f"{prefix}{naming(whole)}", sum(layer["A"].shape[0] for layer in found)
        a = torch.cat([layer["A"] for layer in found])
        b = found[0]["B"] if len(found) == 1 else torch.block_diag(*(f["B"] for f in found))
        out |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        out[f"{key}.alpha"] = torch.tensor(alpha / 4 * rank)
    return out


def flat(name: str) -> str:
    return name.replace(".", "_")


def with_prefix(prefix: str, model: PeftModel) -> dict[str, torch.Tensor]:
    state = get_peft_model_state_dict(model).items()
    return {k.replace("base_model.model.", prefix, 1): v.contiguous() for k, v in state}


FILES = {
    "onetrainer": lambda m: kohya(m, flat, "lora_transformer_", 6.0),
    "onetrainer omi": lambda m: kohya(m, official, "transformer.", 6.0),
    "kohya, diffusers' names": lambda m: kohya(m, flat, "lora_unet_", 6.0),
    "comfyui, flattened": lambda m: fused(m, flat, "lora_unet_", 6.0),
    "comfyui, dotted": lambda m: fused(m, str, "diffusion_model.", 6.0),
    "fp16": lambda m: {k: v.half() for k, v in kohya(m, flat, "lora_transformer_", 6.0).items()},
}


@pytest.mark.parametrize("size_conditions", [False, True])
@pytest.mark.parametrize("layout", FILES)
def test_a_file_with_alphas(tmp_path, layout, size_conditions):
    theirs = adapted(size_conditions)
    save_file(FILES[layout](theirs), tmp_path / "style.safetensors")
    ours = base(size_conditions)[1].with_lora(tmp_path / "style.safetensors")
    bound = 3e-3 if layout == "fp16" else 1e-4
    assert difference(ours, theirs, size_conditions) < bound


def test_dora_of_onetrainer(tmp_path):
    theirs = adapted(use_dora=True)
    save_file(kohya(theirs, flat, "lora_transformer_", 6.0), tmp_path / "style.safetensors")
    assert difference(base()[1].with_lora(tmp_path), theirs) < 1e-4


@pytest.mark.parametrize("size_conditions", [False, True])
def test_the_official_scripts_folder(tmp_path, size_conditions):
    """Its file does not say its alpha: peft's config one folder up does, or --lora-alpha."""
    theirs = adapted(size_conditions, lora_alpha=8)
    folder = tmp_path / "transformer_lora"
    folder.mkdir()
    file = folder / "pytorch_lora_weights.safetensors"
    save_file(with_prefix("unet.base_model.model.", theirs), file)
    ours = base(size_conditions)[1]
    for path in (tmp_path, folder, file):
        with pytest.warns(Notice, match="does not say its alpha.*train with 8.*--lora-alpha"):
            silent = ours.with_lora(path)
        assert difference(silent, theirs, size_conditions) > 0.05  # half as strong
    assert difference(ours.with_lora(folder, alpha=8), theirs, size_conditions) < 1e-4
    with pytest.warns(Notice, match="does not say its alpha"):
        assert difference(ours.with_lora(folder, 2.0), theirs, size_conditions) < 1e-4
    theirs.peft_config["default"].save_pretrained(tmp_path)
    assert difference(ours.with_lora(folder), theirs, size_conditions) < 1e-4


@pytest.mark.parametrize("size_conditions", [False, True])
def test_files_of_diffusers(tmp_path, size_conditions):
    """With the prefix "transformer.", with and without the header's metadata, and without it, as
    save_lora_adapter writes."""
    ours, theirs = base(size_conditions)[1], adapted(size_conditions, use_rslora=True)
    config = theirs.peft_config["default"].to_dict()
    SanaLoraLoaderMixin.save_lora_weights(
        tmp_path / "pipeline",
        transformer_lora_layers={
            k.removeprefix("base_model.model."): v
            for k, v in get_peft_model_state_dict(theirs).items()
        },
        transformer_lora_adapter_metadata=config,
    )
    keys = load_file(tmp_path / "pipeline" / lora.DIFFUSERS)
    assert all(key.startswith("transformer.") for key in keys)
    assert difference(ours.with_lora(tmp_path / "pipeline"), theirs, size_conditions) < 1e-4

    plain = adapted(size_conditions, lora_alpha=4)
    (tmp_path / "silent").mkdir()
    save_file(with_prefix("transformer.", plain), tmp_path / "silent" / lora.DIFFUSERS)
    with pytest.warns(Notice, match="read as alpha = rank, as diffusers does"):
        assert difference(ours.with_lora(tmp_path / "silent"), plain, size_conditions) < 1e-4

    model = WithLora.from_config(base(size_conditions)[0].config)
    model.load_state_dict(base(size_conditions)[0].state_dict())
    model.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=ATTENTION))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_lora_adapter(tmp_path / "adapter")
    assert difference(ours.with_lora(tmp_path / "adapter"), model.eval(), size_conditions) < 1e-4


def test_pefts_old_file_and_a_header_that_speaks_of_another_part(tmp_path):
    theirs = adapted(lora_alpha=4)
    theirs.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    assert difference(base()[1].with_lora(tmp_path), theirs) < 1e-4
    header = {"lora_adapter_metadata": json.dumps({"text_encoder.r": 4})}
    save_file(with_prefix("transformer.", theirs), tmp_path / "x.safetensors", header)
    (tmp_path / lora.CONFIG).unlink()
    with pytest.warns(Notice, match="does not say its alpha"):
        assert difference(base()[1].with_lora(tmp_path / "x.safetensors"), theirs) < 1e-4


def test_several_adapters_with_weights(tmp_path):
    """The sum of what each changes, which in peft is their concatenation."""
    model = adapted(seed=1)
    other = adapted(seed=2, r=3, lora_alpha=5, target_modules=ATTENTION)
    for name, one in (("first", model), ("second", other)):
        one.save_pretrained(tmp_path / name)
    model.load_adapter(tmp_path / "second", adapter_name="second")
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type="cat")
    model.set_adapter("sum")
    ours = base()[1].with_lora([tmp_path / "first", tmp_path / "second"], [0.7, -0.4])
    assert difference(ours, model.eval()) < 1e-4
    with pytest.raises(UserError, match="1 weights for 2 adapters"):
        base()[1].with_lora([tmp_path / "first", tmp_path / "second"], [0.7])
    adapted(use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(UserError, match="a DoRA adapter cannot be added to others"):
        base()[1].with_lora([tmp_path / "first", tmp_path / "dora"])


def test_the_base_stays_and_its_other_parameters_are_shared(tmp_path):
    adapted(target_modules=["attn1.to_q"]).save_pretrained(tmp_path)
    before = base()[1]
    params = jax.tree.map(jnp.array, before.params)
    ours = before.replace(params=params).with_lora(tmp_path)
    assert ours.params["blocks"]["mlp"]["fc1"]["kernel"] is params["blocks"]["mlp"]["fc1"]["kernel"]
    kernel = params["blocks"]["attn"]["q"]["kernel"]
    assert np.array_equal(kernel, before.params["blocks"]["attn"]["q"]["kernel"])
    assert not np.array_equal(kernel, ours.params["blocks"]["attn"]["q"]["kernel"])


def test_bfloat16_kernels_are_summed_in_float32(tmp_path):
    adapted().save_pretrained(tmp_path)
    full = base()[1]
    half = full.replace(params=full.cast_for_compute(full.params, jnp.bfloat16))
    merged = half.with_lora(tmp_path).params["blocks"]["attn"]["q"]["kernel"]
    kernel = half.params["blocks"]["attn"]["q"]["kernel"]
    module = lora.read(tmp_path, full.params).tree["blocks"]["attn"]["q"]
    wanted = np.asarray(kernel, np.float32) + module["a"] @ module["b"]
    assert merged.dtype == jnp.bfloat16
    assert (np.abs(np.float32(merged) - wanted) <= np.abs(wanted) / 256 + 1e-6).all()


def test_int8_kernels_are_refused(tmp_path):
    from pixart_jax.models.quantization import quantize

    tree = {"fc": {"a": np.zeros((4, 2), np.float32), "b": np.zeros((2, 3), np.float32)}}
    with pytest.raises(UserError, match="cannot be merged into int8 kernels"):
        trees.merge({"fc": {"kernel": quantize(jnp.ones((4, 3)))}}, tree)


# ---- what is refused ----


def break_key(state, what, new=None):
    """The tensors with the first key that ends so renamed or removed."""
    key = next(k for k in state if k.endswith(what))
    value = state.pop(key)
    return state | ({} if new is None else {key.replace(what, new): value})


BAD_TENSORS = {
    "unknown": (
        lambda s: {k.replace("0.attn1.to_q", "0.attn3.to_q"): v for k, v in s.items()},
        "layers that it lacks .*transformer_blocks.0.attn3.to_q"),
    "partner": (lambda s: break_key(s, "attn2.to_k.lora_B.weight"),
                r"attn2.to_k.lora_A.weight has no partner lora_B \(lora_up\)"),
    "rank": (lambda s: {k: v[:3] if k.endswith("ff.net.2.lora_A.weight") else v
                        for k, v in s.items()},
             "ff.net.2.lora_A.weight.*not of one rank"),
    "nan": (lambda s: {k: v * math.nan if k.endswith("proj_out.lora_A.weight") else v
                       for k, v in s.items()},
            "proj_out.lora_A.weight holds numbers that are"),
    "lokr": (lambda s: s | {"lycoris_transformer_blocks_0_attn1_to_q.lokr_w1": torch.ones(2, 2)},
             "attn1_to_q.lokr_w1: LoKr is not read"),
    "loha": (lambda s: {"lora_unet_blocks_0_attn_proj.hada_w1_a": torch.ones(2, 2)},
             "hada_w1_a: LoHa is not read"),
    "bias": (lambda s: s | {"base_model.model.proj_out.lora_B.bias": torch.ones(32)},
             "proj_out.lora_B.bias: a bias"),
    "whole tensors": (lambda s: s | {"base_model.model.proj_out.weight": torch.ones(32, 24)},
                      "base_model.model.proj_out.weight: modules_to_save is not read"),
    "no adapter": (lambda s: {"blocks.0.attn.qkv.weight": torch.ones(4, 4)}, "holds no LoRA"),
    "text encoder": (lambda s: {"lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight":
                                torch.ones(4, 4)}, "a text encoder alone"),
    "dora without use_dora": (
        lambda s: s | {"base_model.model.proj_out.lora_magnitude_vector": torch.ones(32)},
        "proj_out.lora_magnitude_vector is DoRA's, its config has no use_dora"),
}  # fmt: skip
BAD_CONFIGS = {
    "loha": ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not read"),
    "modules": ({"modules_to_save": ["proj_out"]}, "modules_to_save is not supported"),
    "bias": ({"bias": "all"}, "bias 'all' is not read"),
    "lora_bias": ({"lora_bias": True}, "lora_bias is not supported"),
    "layers": ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changed the base"),
    "rank": ({"r": 8}, "is of rank 4, its config says 8"),
    "types": ({"lora_alpha": None}, "a value is not valid"),
    "dora": ({"use_dora": True}, "has no partner lora_magnitude_vector"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(path)
    return path


def refused(match: str, path: Path, transformer: Transformer | None = None) -> None:
    with pytest.raises(UserError, match=match) as error:
        (transformer or base()[1]).with_lora(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_file_that_cannot_be_read_is_one_line_that_names_the_key(tmp_path, folder, case):
    change, match = BAD_TENSORS[case]
    (tmp_path / lora.CONFIG).write_text((folder / lora.CONFIG).read_text())
    save_file(change(load_file(folder / lora.PEFT)), tmp_path / lora.PEFT)
    refused(match, tmp_path)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_cannot_be_read_is_one_line_that_names_the_field(tmp_path, folder, case):
    values, match = BAD_CONFIGS[case]
    before = json.loads((folder / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps(before | values))
    (tmp_path / lora.PEFT).write_bytes((folder / lora.PEFT).read_bytes())
    refused(match, tmp_path)


def test_an_adapter_of_another_model(tmp_path, folder):
    refused("layers that it lacks.*resolution_embedder", _saved(tmp_path, adapted(True)))
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8}
    _, config, params = diffusers_pair(**sizes, caption_channels=16, norm_num_groups=4)
    small = Transformer(config, params)
    match = r"lacks \(it has 2 blocks\).*of another size: .* is of \(256, 24\).*of \(256, 16\)"
    refused(match, folder, small)


def _saved(path: Path, model: PeftModel) -> Path:
    model.save_pretrained(path)
    return path


def test_paths_that_hold_no_adapter(tmp_path):
    refused("no such adapter", tmp_path / "missing")
    refused("holds no adapter: adapter_model.safetensors", tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    refused(r"holds several files \(a.safetensors, b.safetensors\)", tmp_path)


def test_tensors_of_a_text_encoder_are_left_out(tmp_path, folder):
    state = load_file(folder / lora.PEFT)
    keys = ("lora_te_encoder_block_0_layer_0_SelfAttention_q.alpha", "bundle_emb.token.t5")
    save_file(state | {key: torch.ones(1) for key in keys}, tmp_path / lora.PEFT)
    (tmp_path / lora.CONFIG).write_text((folder / lora.CONFIG).read_text())
    with pytest.warns(Notice, match="2 tensors of a text encoder are left out"):
        assert difference(base()[1].with_lora(tmp_path), adapted()) < 1e-4


# ---- writing ----


@pytest.mark.parametrize("options", ["plain", "patterns", "some layers", "dora"])
def test_what_is_written_opens_in_peft_and_in_diffusers(tmp_path, options):
    theirs = adapted(True, **OPTIONS[options])
    theirs.save_pretrained(tmp_path / "theirs")
    found = lora.read(tmp_path / "theirs", base(True)[1].params)
    lora.save(tmp_path / "ours", found.tree)
    opened_everywhere(tmp_path / "ours", theirs)
    again = lora.read(tmp_path / "ours" / lora.DIFFUSERS, base(True)[1].params)
    assert lora.read(tmp_path / "ours", base(True)[1].params).digest == found.digest == again.digest


@pytest.mark.parametrize("rslora", [False, True])
def test_a_trained_tree_is_written_with_its_scale(tmp_path, rslora):
    """a and b as trained; the config says what scales them."""
    theirs = adapted(True, lora_alpha=6, use_rslora=rslora)
    theirs.save_pretrained(tmp_path / "theirs")
    scale = 6 / (2 if rslora else 4)
    folded = lora.read(tmp_path / "theirs", base(True)[1].params).tree
    raw = jax.tree_util.tree_map_with_path(
        lambda path, x: x / np.float32(scale) if path[-1].key == "b" else x, folded
    )
    lora.save(tmp_path / "ours", raw, rank=4, alpha=6, rslora=rslora)
    opened_everywhere(tmp_path / "ours", theirs)


def opened_everywhere(folder: Path, theirs: PeftModel) -> None:
    model = PeftModel.from_pretrained(copy.deepcopy(base(True)[0]), folder).eval()
    given = inputs(base(True)[1].config, 8, 8, [5, 3])
    wanted = run_diffusers(theirs, **given)
    assert relative_error(run_diffusers(model, **given), wanted) < 1e-5

    model = WithLora.from_config(base(True)[0].config)
    model.load_state_dict(base(True)[0].state_dict())
    _, metadata = SanaLoraLoaderMixin.lora_state_dict(folder, return_lora_metadata=True)
    model.load_lora_adapter(
        folder,
        prefix="transformer",
        use_safetensors=True,
        weight_name=lora.DIFFUSERS,
        metadata=metadata,
    )
    assert relative_error(run_diffusers(model.eval(), **given), wanted) < 1e-5
    assert difference(base(True)[1].with_lora(folder), theirs, True) < 1e-4

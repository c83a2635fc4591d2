"""Files of other tools: names behind prefixes, checkpoints of several branches, variants of the
weights' files."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from pixart_jax import Pipeline, load_component
from pixart_jax.errors import Notice, UserError
from pixart_jax.weights import dit, t5, transformer, vae
from pixart_jax.weights.checkpoints import select
from pixart_jax.weights.files import find_weights, open_tensors, part_variants

ANCHOR = "x_embedder.proj.weight"
PREFIXES = [
    "module.",
    "model.diffusion_model.",
    "transformer.",
    "_orig_mod.module.",
    "base_model.model.",
    "_fsdp_wrapped_module.",
    "state_dict.module.module._orig_mod.model.",
]
ANCHORS = {
    "official": transformer.OFFICIAL_ANCHORS,
    "diffusers": transformer.DIFFUSERS_ANCHORS,
    "dit": dit.ANCHORS,
    "t5": t5.ANCHORS,
    "vae": vae.ANCHORS,
}


def saved(content, path: Path) -> Path:
    save = torch.save if path.suffix == ".pth" else safetensors.torch.save_file
    save(content, path)
    return path


def model(value: float = 0.0, prefix: str = "") -> dict[str, torch.Tensor]:
    names = (ANCHOR, "blocks.0.mlp.fc1.weight")
    return {f"{prefix}{name}": torch.full((2,), value) for name in names}


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
@pytest.mark.parametrize("kind", ANCHORS)
def test_any_prefix_before_a_known_name_is_found_for_every_table(kind, prefix, tmp_path):
    names = (ANCHORS[kind][0], "some.other.name")
    content = {f"{prefix}{name}": torch.zeros(2) for name in names}
    found = select(open_tensors(saved(content, tmp_path / "x.safetensors")), ANCHORS[kind])
    assert set(found.tensors) == set(names) and not found.notes
    assert found.place == (f"prefix {prefix!r}" if prefix else "")
    assert found.tensors.source.endswith(f"({found.place})" if prefix else "x.safetensors")


def test_wrappers_of_single_modules_are_removed_inside_names(tmp_path):
    names = ("module._orig_mod.x_embedder.proj.weight", "module.blocks.3._orig_mod.attn.qkv.weight")
    names += ("module.blocks.3.mlp._checkpoint_wrapped_module.fc1.weight",)
    path = saved({name: torch.zeros(2) for name in names}, tmp_path / "x.pth")
    found = select(open_tensors(path), (ANCHOR,))
    assert set(found.tensors) == {ANCHOR, "blocks.3.attn.qkv.weight", "blocks.3.mlp.fc1.weight"}
    assert found.place == "prefix 'module._orig_mod.'"


RAW, AVERAGE = model(1), model(2)
BRANCHES = {  # content, the value taken, its place, notes; with average=False the value
    "weights": ({"state_dict": RAW}, 1, "state_dict", [], 1),
    "other names": (
        {"params": RAW, "params_ema": AVERAGE},
        2,
        "params_ema",
        ["passed over: params"],
        1,
    ),
    "two levels": ({"model": {"module": RAW}, "step": 3}, 1, "model/module", [], 1),
    "nested average": (
        {"model": RAW, "ema": {"state_dict": model(2, "module."), "decay": 0.9}},
        2,
        "ema/state_dict, prefix 'module.'",
        ["passed over: model"],
        1,
    ),
    "an empty average": (
        {"state_dict": RAW, "state_dict_ema": {}},
        1,
        "state_dict",
        ["the average state_dict_ema is empty"],
        1,
    ),
    "no average": (
        {"state_dict": RAW, "ema_state_dict": None},
        1,
        "state_dict",
        ["the average ema_state_dict is empty"],
        1,
    ),
    "optimizer by names": (
        {"model": RAW, "optimizer": {"exp_avg": model(5), "ema_grads": model(6)}},
        1,
        "model",
        [],
        1,
    ),
    "one level": (
        model(1, "online_model.") | model(2, "ema_model."),
        2,
        "prefix 'ema_model.'",
        ["passed over: online_model"],
        1,
    ),
    "an average in the model": (model(1) | model(2, "ema."), 2, "prefix 'ema.'", None, 1),
    "a schema is no average": ({"schema": model(1)}, 1, "schema", [], 1),
    "other models beside": (
        model(1, "model.diffusion_model.") | {"vae.a.b": torch.ones(1), "vae.c": torch.ones(1)},
        1,
        "prefix 'model.diffusion_model.'",
        ["left out: vae (2 tensors)"],
        1,
    ),
}


@pytest.mark.parametrize("case", BRANCHES)
def test_branches_are_found_by_content_and_averages_first(case, tmp_path):
    content, value, place, notes, raw = BRANCHES[case]
    tensors = open_tensors(saved(content, tmp_path / "x.pth"))
    found = select(tensors, (ANCHOR,))
    assert set(found.tensors) == set(model()) and found.place == place
    assert found.tensors[ANCHOR][0] == value
    assert notes is None or found.notes == notes
    plain = select(tensors, (ANCHOR,), average=False)
    assert set(plain.tensors) == set(model()) and plain.tensors[ANCHOR][0] == raw
    assert value == raw or "passed over: the average" in plain.notes[0]


def test_of_several_models_one_must_be_named(tmp_path):
    content = {"student": model(1), "teacher": model(2, "module."), "ema_0.99": {}}
    tensors = open_tensors(saved(content, tmp_path / "x.pth"))
    with pytest.raises(UserError, match=r"several models \(student, teacher/module\).*--branch"):
        select(tensors, (ANCHOR,))
    assert select(tensors, (ANCHOR,), branch="teacher").tensors[ANCHOR][0] == 2
    with pytest.raises(UserError, match="no model in 'techer'.*did you mean 'teacher"):
        select(tensors, (ANCHOR,), branch="techer")
    two = {"ema_0.99": model(1), "ema_0.999": model(2), "model": model(3)}
    tensors = open_tensors(saved(two, tmp_path / "y.pth"))
    with pytest.raises(UserError, match="several models"):
        select(tensors, (ANCHOR,))
    assert select(tensors, (ANCHOR,), branch="ema_0.999").tensors[ANCHOR][0] == 2
    alone = open_tensors(saved({"ema": model(1)}, tmp_path / "z.pth"))
    with pytest.raises(UserError, match="averages alone: ema"):
        select(alone, (ANCHOR,), average=False)


# ---- folders ----


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def weights(part: Path) -> Path:
    return next(path for path in part.glob("*model.safetensors"))


def equal(one, other) -> bool:
    same = jax.tree.map(np.array_equal, one.params, other.params)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_folder_opens_with_any_prefix_and_a_misfit_names_it(part, folder):
    want, path = load_component(folder / part), weights(folder / part)
    state = safetensors.torch.load_file(path)
    for prefix in ("module._orig_mod.", "model.diffusion_model."):
        saved({f"{prefix}{name}": value for name, value in state.items()}, path)
        assert equal(load_component(folder / part), want)
    lost = {f"model.{name}": value for name, value in list(state.items())}
    del lost[f"model.{sorted(state)[5]}"]
    saved(lost, path)
    with pytest.raises(UserError, match=r"\(prefix 'model\.'\) does not fit .*1 missing"):
        load_component(folder / part)


def test_a_checkpoint_in_a_folder_is_read_and_what_was_taken_is_said(folder):
    part = folder / "transformer"
    want, path = load_component(part), weights(part)
    state = safetensors.torch.load_file(path)
    path.unlink()
    other = {name: value + 1 for name, value in state.items()}
    file = part / "diffusion_pytorch_model.bin"
    torch.save({"state_dict": other, "ema": state}, file)
    with pytest.warns(Notice, match=r"model.bin \(ema\): passed over: state_dict"):
        assert equal(load_component(part), want)
    torch.save({"module": state, "ema": {}}, file)
    with pytest.warns(Notice, match=r"model.bin \(module\): the average ema is empty"):
        assert equal(load_component(part), want)


def variant(part: Path, name: str, keep: bool = False, add: float = 0.0) -> None:
    """The part's weights as those of a variant."""
    path = weights(part)
    state = {k: v.half() + add for k, v in safetensors.torch.load_file(path).items()}
    saved(state, part / f"{path.stem}.{name}.safetensors")
    if not keep:
        path.unlink()


VARIANTS = [  # files, --variant, the one that is opened or the error
    (["model.fp16.safetensors"], None, "model.fp16.safetensors"),
    (["model.fp16.safetensors", "pytorch_model.bin"], None, "model.fp16.safetensors"),
    (["model.safetensors", "model.fp16.safetensors"], None, "model.safetensors"),
    (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
    (["model.safetensors", "pytorch_model.fp16.bin"], "fp16", "pytorch_model.fp16.bin"),
    (
        ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"],
        None,
        "model.safetensors.index.fp16.json",
    ),
    (
        ["model-00001-of-00002.fp16.safetensors", "model.fp16.safetensors.index.json"],
        "fp16",
        "model.fp16.safetensors.index.json",
    ),
    (["diffusion_pytorch_model.non_ema.bin"], None, "diffusion_pytorch_model.non_ema.bin"),
    (["model.fp16.safetensors", "model.bf16.safetensors"], None, "there are bf16, fp16; choose"),
    (["model.safetensors"], "fp16", "no weights of variant 'fp16': there are none"),
    (["model-00001-of-00002.safetensors"], None, "the index.json is missing"),
]


@pytest.mark.parametrize("files, name, opened", VARIANTS)
def test_a_sole_variant_is_opened_and_several_are_named(files, name, opened, tmp_path):
    for file in files:
        (tmp_path / file).write_bytes(b"")
    if (tmp_path / opened).exists():
        assert find_weights(tmp_path, name).name == opened
    else:
        with pytest.raises(UserError, match=opened):
            find_weights(tmp_path, name)


def test_a_model_of_variants_is_opened_by_name_in_every_part_that_has_it(folder):
    plain = Pipeline.from_pretrained(folder)
    for part in ("transformer", "text_encoder"):
        variant(folder / part, "fp16", keep=True, add=0.5)
    with pytest.warns(Notice, match="vae without weights of variant 'fp16'"):
        pipe = Pipeline.from_pretrained(folder, variant="fp16")
    other = load_component(folder / "transformer", variant="fp16")
    assert equal(pipe.transformer, other) and not equal(pipe.transformer, plain.transformer)
    assert equal(pipe.vae, plain.vae)
    assert pipe.text_identity["text_encoder"] != plain.text_identity["text_encoder"]
    with pytest.raises(UserError, match="no weights of variant 'fp8': there are fp16, none"):
        Pipeline.from_pretrained(folder, variant="fp8")
    for part in ("transformer", "text_encoder"):
        weights(folder / part).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert equal(Pipeline.from_pretrained(folder).transformer, other)
        assert part_variants(folder, ("vae",), None) == {"vae": None}


def test_official_names_in_a_folder_are_read(tiny_model, tmp_path):
    from pixart_jax.weights.files import write_safetensors

    part = load_component(tiny_model / "transformer")
    shutil.copytree(tiny_model / "transformer", folder := tmp_path / "t")
    write_safetensors(weights(folder), transformer.to_official(part.config, part.params))
    assert equal(load_component(folder), part)

"""convert: every released form becomes a folder, official files and back to the bit, and bad input
leaves nothing behind."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import PixArtTransformer2DModel

from benchmarks.parity_rows import official
from pixart_jax import __main__ as front
from pixart_jax import cli, load_component
from pixart_jax.models.configs import DiTConfig, TransformerConfig
from pixart_jax.models.embedders import sincos_2d
from pixart_jax.weights import dit
from pixart_jax.weights import transformer as names
from pixart_jax.weights.component import DiT
from pixart_jax.weights.files import open_tensors
from pixart_jax.weights.table import flatten, write
from tests import tiny_diffusers
from tests.models.official_reference import OfficialPixArt, run_official
from tests.models.reference import inputs, param_shapes, randomise, relative_error, run_diffusers

HEADS = 3
SIZES = {"depth": 3, "width": 24, "heads": HEADS, "caption_width": 16}
SIZES |= {"sample_size": 16, "position_scale": 2.0}
SIGMA = {**SIZES, "text_tokens": 300}
MODELS = {
    "alpha": TransformerConfig(**SIZES),
    "alpha multi-scale": TransformerConfig(**SIZES, size_conditions=True),
    "sigma": TransformerConfig(**SIGMA),
    "sigma, query and key norm": TransformerConfig(**SIGMA, qk_norm=True),
    "sigma, KV compression": TransformerConfig(
        **SIGMA, kv_compression=2, kv_compression_layers=(1, 2)
    ),
    "sigma, both": TransformerConfig(
        **SIGMA, kv_compression=2, kv_compression_layers=(0, 2), qk_norm=True
    ),
}
BOTH = MODELS["sigma, both"]
OFFICIAL = ("--format", "official")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def run(source, out, *flags) -> int:
    """convert, with the heads of a file unless flags name them."""
    heads = ["--heads", HEADS] if Path(source).is_file() and "--heads" not in flags else []
    return cli.run(front.main, ["convert", *map(str, (source, out, *heads, *flags))])


@pytest.fixture
def convert(capsys):
    """convert(source, out, *flags) → what is printed."""

    def call(*argv) -> str:
        assert run(*argv) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(source, *flags) → the one line; and nothing is left where OUT would be, nor beside
    it."""

    def call(source, *flags, out=None) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert run(source, out or tmp_path / "out", *flags) == 2
        said, error = capsys.readouterr()
        assert said == "" and error.startswith("error: ") and error.count("\n") == 1, error
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return error

    return call


def checkpoint(config: TransformerConfig, path, lacks=(), **changed) -> OfficialPixArt:
    """An official .pth of a config, weights random; its model. lacks: tensors left out. changed:
    others ('blocks__0': a tensor)."""
    model = randomise(OfficialPixArt(config))
    state = {key: value for key, value in model.state_dict().items() if key not in lacks}
    state |= {name.replace("__", "."): value for name, value in changed.items()}
    torch.save({"state_dict": state}, path)
    return model


def edit(file: Path, *removed: str, **fields) -> None:
    """Change fields of a JSON file."""
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in values.items() if k not in removed}))


def same_files(one: Path, other: Path, *files) -> bool:
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


@pytest.fixture
def sigma_pth(tmp_path):
    checkpoint(BOTH, tmp_path / "sigma.pth")
    return tmp_path / "sigma.pth"


# ---- official files, read and written ----


@pytest.mark.parametrize("kind", MODELS)
def test_pth_to_folder_to_official_file_is_exact_to_the_bit_and_loads_strictly(
    kind, tmp_path, convert
):
    config = MODELS[kind]
    model = checkpoint(config, tmp_path / "p.pth")
    said = convert(tmp_path / "p.pth", tmp_path / "folder")
    assert "parameters" in said and "(state_dict)" in said
    part = load_component(tmp_path / "folder")
    assert part.config == config
    said = convert(tmp_path / "folder", tmp_path / "p.safetensors", *OFFICIAL)
    assert "lacks" not in said and "without" not in said

    state = safetensors.torch.load_file(tmp_path / "p.safetensors")
    OfficialPixArt(config).load_state_dict(state, strict=True)
    for key, value in model.state_dict().items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key

    args = inputs(config, 8, 12, [5, 2])
    assert relative_error(part.apply(**args), run_official(model, **args)) <= 1e-5

    # an official .safetensors file is read as a .pth is, and written again is the same file
    convert(tmp_path / "p.safetensors", tmp_path / "again")
    files = ("config.json", WEIGHTS, "null_caption.safetensors")
    assert same_files(tmp_path / "folder", tmp_path / "again", *files)
    convert(tmp_path / "p.safetensors", tmp_path / "q.safetensors", *OFFICIAL)
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


@pytest.mark.parametrize("size_conditions", [False, True], ids=["plain", "multi-scale"])
def test_an_official_pth_of_diffusers_weights_evaluates_as_diffusers_and_opens_there(
    size_conditions, tmp_path, convert
):
    pipe = tiny_diffusers.build(size_conditions=size_conditions)
    theirs, null = pipe.transformer, torch.randn(120, 16)
    state = official.transformer(dict(theirs.state_dict()), 2)
    state["y_embedder.y_embedding"] = null
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "PixArt.pth")
    flags = ("--sample-size", theirs.config.sample_size, "--scale", 1)
    convert(tmp_path / "PixArt.pth", tmp_path / "out", *flags)
    part = load_component(tmp_path / "out")
    np.testing.assert_array_equal(part.params["null_caption"], null)
    args = inputs(part.config, 8, 6, [5, 2])
    for model in (theirs, PixArtTransformer2DModel.from_pretrained(tmp_path / "out").eval()):
        assert relative_error(part.apply(**args), run_diffusers(model, **args)) < 1e-4
    convert(tmp_path / "out", tmp_path / "again")
    assert same_files(tmp_path / "out", tmp_path / "again", "config.json", WEIGHTS)


def test_a_diffusers_model_becomes_an_official_file_that_says_what_it_lacks(tmp_path, convert):
    pipe = tiny_diffusers.build(tmp_path / "model")
    said = convert(tmp_path / "model", tmp_path / "p.safetensors", *OFFICIAL)
    assert "without y_embedder.y_embedding" in said
    part = load_component(tmp_path / "model" / "transformer")
    model = OfficialPixArt(part.config)
    state = safetensors.torch.load_file(tmp_path / "p.safetensors")
    missing = model.load_state_dict(state, strict=False)
    assert missing.missing_keys == ["y_embedder.y_embedding"] and not missing.unexpected_keys
    assert torch.equal(model.pos_embed, pipe.transformer.pos_embed.pos_embed)
    args = inputs(part.config, 8, 12, [5, 2])
    assert relative_error(part.apply(**args), run_official(model, **args)) <= 1e-5
    convert(tmp_path / "model", tmp_path / "scaled", "--scale", 2)
    assert load_component(tmp_path / "scaled").config.position_scale == 2.0


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_dit_becomes_an_official_file_and_back_to_the_bit(form, tmp_path, convert):
    config = DiTConfig(depth=2, width=24, heads=HEADS, sample_size=8, num_classes=10)
    rng = np.random.default_rng(0)
    shapes = param_shapes(DiT, config)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)
    DiT(config, params).save(tmp_path / "folder")
    convert(tmp_path / "folder", file := tmp_path / "dit.safetensors", *OFFICIAL)
    tensors = open_tensors(file)
    assert set(tensors) == {*write(dit.OFFICIAL, params), "pos_embed"}
    assert tensors.shape("pos_embed") == (1, 16, 24)
    flags = ()
    if form == "pt":  # as released: without the position table
        state = safetensors.torch.load_file(file)
        del state["pos_embed"]
        torch.save(state, file := tmp_path / "dit.pt")
        flags = ("--sample-size", 8)
    convert(file, tmp_path / "again", *flags)
    again = load_component(tmp_path / "again")
    assert again.config == config
    for path, value in flatten(again.params).items():
        np.testing.assert_array_equal(value, flatten(params)[path], err_msg=path)


def test_the_position_table_is_the_official_codes_to_the_bit():
    """The official arithmetic: fp32 coordinates, fp64 angles."""
    for size, scale in ((32, 0.5), (32, 1.0), (64, 1.0), (128, 2.0)):
        side = size // 2
        at = (np.arange(side, dtype=np.float32) / (side / side) / scale).astype(np.float64)
        angles = at[:, None] * (1.0 / 10000 ** (np.arange(288, dtype=np.float64) / 288.0))
        axis = np.concatenate([np.sin(angles), np.cos(angles)], 1)
        want = np.concatenate([np.tile(axis, (side, 1)), np.repeat(axis, side, 0)], 1)
        config = TransformerConfig.preset("XL/2", sample_size=size, position_scale=scale)
        np.testing.assert_array_equal(names.position_table(config)[0], want.astype(np.float32))


# ---- what released and trained files hold ----


def test_what_training_leaves_beside_and_around_the_weights_is_tolerated(tmp_path, convert):
    model = randomise(OfficialPixArt(BOTH))
    optimizer = torch.optim.AdamW(model.parameters())
    mask = torch.ones(1, 2, dtype=torch.bool)
    latents, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 16)
    model(latents, torch.zeros(1), text, mask).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = model.state_dict()
    plain = {"state_dict": state, "optimizer": optimizer.state_dict(), "epoch": 3}
    plain["scheduler"] = schedule.state_dict()
    # names behind "module.", and a counter
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    assert "n_averaged" in averaged
    compiled = {f"module._orig_mod.{key}": value for key, value in state.items()}
    files = {"plain": plain, "bare": state, "compiled": {"state_dict": compiled}}
    files["averaged"] = {**plain, "state_dict_ema": averaged}
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        convert(tmp_path / f"{name}.pth", tmp_path / name)
        assert same_files(tmp_path / name, tmp_path / "plain", "config.json", WEIGHTS), name


def test_the_average_is_taken_where_there_is_one_unless_a_flag_says_otherwise(tmp_path, convert):
    state = checkpoint(MODELS["alpha"], tmp_path / "p.pth").state_dict()
    average = {key: value + 1 if key == "t_block.1.bias" else value for key, value in state.items()}
    torch.save({"state_dict": state, "state_dict_ema": average}, tmp_path / "p.pth")
    assert "(state_dict_ema)" in convert(tmp_path / "p.pth", tmp_path / "ema")
    assert "(state_dict)" in convert(tmp_path / "p.pth", tmp_path / "raw", "--no-ema")
    ema, raw = (load_component(tmp_path / n).params["t_block"]["bias"] for n in ("ema", "raw"))
    np.testing.assert_allclose(ema, raw + 1, rtol=1e-6)


def test_an_empty_average_does_not_hide_the_weights_and_a_flag_chooses(tmp_path, convert, refused):
    state = checkpoint(MODELS["alpha"], tmp_path / "p.pth").state_dict()
    torch.save({"state_dict": state, "state_dict_ema": {}}, tmp_path / "p.pth")
    said = convert(tmp_path / "p.pth", tmp_path / "a")
    assert "(state_dict); the average state_dict_ema is empty" in said
    other = {f"module.{key}": value + 1 for key, value in state.items() if key != "pos_embed"}
    other["module.pos_embed"] = state["pos_embed"]
    torch.save({"model": state, "params_ema": other, "teacher": other}, tmp_path / "p.pth")
    said = convert(tmp_path / "p.pth", tmp_path / "b")
    assert "(params_ema, prefix 'module.'); passed over: model, teacher/module" in said
    said = convert(tmp_path / "p.pth", tmp_path / "c", "--branch", "model")
    assert "(model); passed over: the average params_ema/module; passed over: teacher" in said
    assert same_files(tmp_path / "a", tmp_path / "c", WEIGHTS)
    assert not same_files(tmp_path / "a", tmp_path / "b", WEIGHTS)
    assert "several models (model, teacher/module)" in refused(tmp_path / "p.pth", "--no-ema")
    line = refused(tmp_path / "p.pth", "--branch", "params")
    assert "holds no model in 'params' (did you mean 'params_ema/module'?)" in line


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "module.module.", "transformer.", "net._orig_mod."]
)
def test_single_files_with_and_without_other_models_and_of_many_blocks(prefix, tmp_path, convert):
    config = TransformerConfig(**{**SIGMA, "depth": 42 if prefix else 3})  # 42: PixArt-Σ 900M
    state = randomise(OfficialPixArt(config)).state_dict()
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", tmp_path / "plain")
    state = {f"{prefix}{key}": value for key, value in state.items()}
    safetensors.torch.save_file(state, tmp_path / "alone.safetensors")
    t5 = {f"text_encoders.t5xxl.transformer.{n}.weight": torch.ones(2, 2) for n in "abc"}
    others = {**t5, "first_stage_model.encoder.conv_in.weight": torch.ones(2)}
    safetensors.torch.save_file(state | others, tmp_path / "whole.safetensors")
    for name in ("alone", "whole"):
        said = convert(tmp_path / f"{name}.safetensors", tmp_path / name)
        assert not prefix or f"(prefix {prefix!r})" in said
        assert same_files(tmp_path / name, tmp_path / "plain", "config.json", WEIGHTS)
    assert load_component(tmp_path / "whole").config == config
    assert "left out: first_stage_model (1 tensor), text_encoders (3 tensors)" in said


def test_a_misfit_names_the_prefix_it_saw(tmp_path, refused):
    state = randomise(OfficialPixArt(BOTH)).state_dict()
    state = {f"net.{key}": value for key, value in state.items() if "t_block" not in key}
    torch.save(state, tmp_path / "p.pth")
    assert "p.pth (prefix 'net.') does not fit the model: 2 missing" in refused(tmp_path / "p.pth")
    torch.save({"net.a.weight": torch.ones(2), "net.b": torch.ones(2)}, tmp_path / "q.pth")
    assert "q.pth (prefix 'net.') is neither a PixArt" in refused(tmp_path / "q.pth")


@pytest.mark.parametrize("size_conditions", [False, True], ids=["plain", "multi-scale"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_single_file_with_diffusers_names_becomes_the_folder_it_came_from(
    prefix, size_conditions, tmp_path, convert, refused
):
    model = tiny_diffusers.build(tmp_path / "model", size_conditions=size_conditions).transformer
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    assert f"{prefix}pos_embed.pos_embed" not in state
    torch.save(state, tmp_path / "p.pth")
    flags = ("--scale", 1)
    if not size_conditions:
        assert "or --sample-size" in refused(tmp_path / "p.pth")
        flags = (*flags, "--sample-size", 8)
    convert(tmp_path / "p.pth", tmp_path / "out", *flags)
    want = load_component(tmp_path / "model" / "transformer")
    found = load_component(tmp_path / "out")
    assert found.config == want.config
    for path, value in flatten(want.params).items():
        np.testing.assert_array_equal(flatten(found.params)[path], value, err_msg=path)


def test_a_variant_of_a_folders_weights_is_chosen_by_a_flag(tmp_path, convert, refused):
    tiny_diffusers.build(tmp_path / "model")
    part = tmp_path / "model" / "transformer"
    convert(part, tmp_path / "plain")
    state = safetensors.torch.load_file(part / WEIGHTS)
    half = {key: value.half() for key, value in state.items()}
    safetensors.torch.save_file(half, part / WEIGHTS.replace(".safe", ".fp16.safe"))
    convert(tmp_path / "model", tmp_path / "half", "--variant", "fp16")
    assert not same_files(tmp_path / "plain", tmp_path / "half", WEIGHTS)
    assert "no weights of variant 'fp8'" in refused(part, "--variant", "fp8")


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_position_table_gives_size_and_scale(scale, tmp_path, convert):
    table = torch.from_numpy(sincos_2d(16, 16, 24, 16, scale))[None]
    checkpoint(MODELS["alpha"], tmp_path / "p.pth", pos_embed=table)
    convert(tmp_path / "p.pth", tmp_path / "out")
    config = load_component(tmp_path / "out").config
    assert (config.sample_size, config.position_scale) == (32, scale)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["interpolation_scale"] == scale


def test_heads_are_known_for_released_widths_and_asked_for_otherwise(tmp_path, capsys):
    state = checkpoint(MODELS["alpha"], tmp_path / "p.pth").state_dict()
    argv = ["convert", str(tmp_path / "p.pth"), str(tmp_path / "out")]
    assert cli.run(front.main, argv) == 2 and "give --heads" in capsys.readouterr().err
    for width, heads in ((384, 6), (768, 12), (1024, 16), (1152, 16)):
        shapes = {
            key: tuple(n * width // 24 if n % 24 == 0 else n for n in value.shape)
            for key, value in state.items()
        }
        assert names.config_from_official(shapes, sample_size=32).heads == heads


@pytest.mark.parametrize("pixels, scale", [(256, 0.5), (512, 1.0), (1024, 2.0), (2048, 4.0)])
def test_a_sigma_file_without_a_position_table_is_scaled_by_its_size(
    pixels, scale, tmp_path, convert
):
    checkpoint(MODELS["sigma"], tmp_path / "p.pth", lacks=("pos_embed",))
    for flags, want in (((), scale), (("--scale", 3), 3.0)):
        out = tmp_path / f"out{want}"
        convert(tmp_path / "p.pth", out, "--sample-size", pixels // 8, *flags)
        config = load_component(out).config
        assert (config.sample_size, config.position_scale) == (pixels // 8, want)
        assert (config.text_tokens, config.size_conditions) == (300, False)


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--sample-size", 32), "--sample-size 32: the file's own position table is of 16"),
        (("--tokens", 120), "its captions are of 300 tokens (PixArt-Σ)"),
        (("--scale", -1), "position_scale = -1.0: must be positive"),
        (("--heads", 7), "must be a multiple of heads = 7"),
        (("--format", "offical"), "offical"),
        (OFFICIAL, "writes one .safetensors file"),
    ],
)
def test_flags_that_contradict_the_file_are_named(sigma_pth, refused, flags, says):
    assert says in refused(sigma_pth, *flags)


# ---- a PixArt-Σ is not taken for a PixArt-α ----


def test_a_sigma_file_that_does_not_say_its_captions_length_is_not_taken_for_alpha(
    tmp_path, convert, refused
):
    checkpoint(BOTH, tmp_path / "p.pth", lacks=("y_embedder.y_embedding",))
    assert "looks like PixArt-Σ: give --tokens 300" in refused(tmp_path / "p.pth")
    convert(tmp_path / "p.pth", tmp_path / "told", "--tokens", 300)
    assert load_component(tmp_path / "told").config.text_tokens == 300
    # nothing in it distinguishes the two: said aloud
    checkpoint(MODELS["sigma"], tmp_path / "either.pth", lacks=("y_embedder.y_embedding",))
    said = convert(tmp_path / "either.pth", tmp_path / "o")
    assert "120 tokens, as PixArt-α's (PixArt-Σ: give --tokens 300)" in said


def test_a_sigma_folder_of_diffusers_is_told_by_its_index_or_by_a_flag(tmp_path, convert, refused):
    tiny_diffusers.build(tmp_path / "model")
    edit(tmp_path / "model" / "model_index.json", _class_name="PixArtSigmaPipeline")
    convert(tmp_path / "model", tmp_path / "sigma")
    assert load_component(tmp_path / "sigma").config.text_tokens == 300
    assert "300 tokens (PixArt-Σ)" in refused(tmp_path / "model", "--tokens", 120)

    # alone, it says nothing; at 1024 px without size conditions it is no PixArt-α
    part = tmp_path / "model" / "transformer"
    edit(part / "config.json", sample_size=128, use_additional_conditions=False)
    assert "looks like PixArt-Σ" in refused(part)
    convert(part, tmp_path / "told", "--tokens", 300)
    assert load_component(tmp_path / "told").config.text_tokens == 300


LAYERS = "kv_compression_layers"


@pytest.mark.parametrize(
    "removed, fields, says",
    [
        (["kv_compression", LAYERS], {}, "8 left over: transformer_blocks.[0,2].attn1.sr.bias"),
        ([], {LAYERS: [0]}, "4 left over: transformer_blocks.2.attn1.sr.bias"),
        ([], {LAYERS: "last"}, LAYERS),
        ([], {LAYERS: 2}, "wrong type"),
    ],
)
def test_a_folder_with_kv_compression_opened_without_it_is_refused(
    sigma_pth, tmp_path, convert, refused, removed, fields, says
):
    convert(sigma_pth, tmp_path / "folder")
    edit(tmp_path / "folder" / "config.json", *removed, **fields)
    assert says in refused(tmp_path / "folder")


def test_layers_of_different_ratios_are_named(tmp_path, refused):
    four = {"blocks__2__attn__sr__weight": torch.zeros(24, 1, 4, 4)}
    checkpoint(BOTH, tmp_path / "p.pth", **four)
    assert "several ratios of key and value compression" in refused(tmp_path / "p.pth")


# ---- bad input: one line, exit status 2, nothing half-written ----


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_a_truncated_pth_is_named(legacy, share, tmp_path, refused):
    state = {"state_dict": randomise(OfficialPixArt(BOTH)).state_dict()}
    torch.save(state, tmp_path / "p.pth", _use_new_zipfile_serialization=not legacy)
    data = (tmp_path / "p.pth").read_bytes()
    (tmp_path / "p.pth").write_bytes(data[: int(len(data) * share)])
    assert "p.pth cannot be read as a PyTorch file" in refused(tmp_path / "p.pth")


def test_a_truncated_safetensors_shard_is_named(sigma_pth, tmp_path, convert, refused):
    convert(sigma_pth, tmp_path / "folder")
    weights = tmp_path / "folder" / WEIGHTS
    tensors = safetensors.torch.load_file(weights)
    weights.unlink()
    weight_map = {}
    for n in (1, 2):
        shard = f"diffusion_pytorch_model-{n:05}-of-00002.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[n - 1 :: 2]}
        safetensors.torch.save_file(part, weights.parent / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = weights.parent / f"{weights.name}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    shutil.copytree(weights.parent, tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "joined")

    second = weights.parent / shard
    second.write_bytes(second.read_bytes()[:-5])
    for flags, out in (((), "out"), (OFFICIAL, "out.safetensors")):
        line = refused(tmp_path / "folder", *flags, out=tmp_path / out)
        assert second.name in line and "damaged or cut short" in line


class Payload:
    """What a malicious file holds: opening it as a pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pth_with_code_in_it_is_named_and_does_not_run(tmp_path, refused):
    mark = tmp_path / "ran"
    state = randomise(OfficialPixArt(BOTH)).state_dict()
    code = {"state_dict": state, "extra": Payload(mark)}
    for content in (code, Payload(mark), {"state_dict": torch.nn.Linear(2, 2)}):
        torch.save(content, tmp_path / "p.pth")
        assert "could run code" in refused(tmp_path / "p.pth")
        assert not mark.exists()


def test_files_of_other_kinds_are_named(tmp_path, refused):
    pipe = tiny_diffusers.build(model := tmp_path / "model")
    torch.save(pipe.transformer.state_dict(), tmp_path / "diffusers.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "notes.txt").write_text("")
    for source, flags, says in (
        ("absent.pth", (), "does not exist"),
        ("diffusers.pth", (), "has diffusers' names: give the folder"),
        ("other.pth", (), "neither a PixArt transformer"),
        (f"model/vae/{WEIGHTS}", (), "neither a PixArt transformer"),
        ("notes.txt", (), "weights are .safetensors"),
        ("model", ("--heads", 3), "--heads and --sample-size are for .pth"),
        ("model/vae", ("--scale", 2), "--tokens and --scale are for a transformer"),
    ):
        assert says in refused(tmp_path / source, *flags)
    line = refused(model / "vae", *OFFICIAL, out=tmp_path / "o.safetensors")
    assert "for a transformer, a DiT or a ControlNet: the source is a VAE" in line


def test_an_out_that_is_there_is_named_and_stays(sigma_pth, tmp_path, refused):
    mine, file = tmp_path / "full" / "mine", tmp_path / "file.safetensors"
    mine.parent.mkdir()
    mine.write_text("keep")
    file.write_text("keep")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "absent")
    for out, flags, says in (
        (mine.parent, (), "full is there already: name a new folder"),
        (mine, (), "is there already"),
        (file, (), "is there already"),
        (tmp_path / "link.safetensors", (), "is there already"),
        (file, OFFICIAL, "is there already: name a new file"),
    ):
        assert says in refused(sigma_pth, *flags, out=out)
    assert mine.read_text() == file.read_text() == "keep"


def test_an_empty_folder_may_be_out(sigma_pth, tmp_path, convert):
    (tmp_path / "out").mkdir()
    convert(sigma_pth, tmp_path / "out")
    assert load_component(tmp_path / "out").config == BOTH


@pytest.mark.parametrize("flags, name", [((), "out"), (OFFICIAL, "out.safetensors")])
def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left(
    flags, name, sigma_pth, tmp_path, refused
):
    (tmp_path / "file").write_text("")
    deep = tmp_path / "file" / "deep" / name
    assert f"{tmp_path / 'file'} is not a folder" in refused(sigma_pth, *flags, out=deep)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the system refuses to make a file grow beyond this, as a disk that fills
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        line = refused(sigma_pth, *flags, out=tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {tmp_path / name}" in line

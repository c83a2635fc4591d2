"""convert: PixArt-Σ's files, files under the official names and back to the bit, and bad input that
leaves nothing behind."""

from __future__ import annotations

import json
import resource
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from pixart_jax import __main__ as front
from pixart_jax import cli, load_component
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.transformer import TransformerConfig
from pixart_jax.weights import dit
from pixart_jax.weights import transformer as names
from pixart_jax.weights.component import DiT
from pixart_jax.weights.files import open_tensors
from pixart_jax.weights.table import flatten, write
from tests import tiny_diffusers
from tests.models.official_reference import OfficialPixArt, run_official
from tests.models.reference import abstract_params, inputs, randomise, relative_error

HEADS = 3
SIZES = {
    "depth": 3,
    "width": 24,
    "heads": HEADS,
    "caption_width": 16,
    "sample_size": 16,
    "position_scale": 2.0,
}
MODELS = {
    "alpha": TransformerConfig(**SIZES),
    "alpha multi-scale": TransformerConfig(**SIZES, size_conditions=True),
    "sigma": TransformerConfig(**SIZES, text_tokens=300),
    "sigma, query and key norm": TransformerConfig(**SIZES, text_tokens=300, qk_norm=True),
    "sigma, KV compression": TransformerConfig(
        **SIZES, text_tokens=300, kv_compression=2, kv_compression_layers=(1, 2)
    ),
    "sigma, both": TransformerConfig(
        **SIZES, text_tokens=300, kv_compression=2, kv_compression_layers=(0, 2), qk_norm=True
    ),
}
SIGMA = MODELS["sigma, both"]


def convert(capsys, *argv) -> str:
    assert cli.run(front.main, ["convert", *map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.fixture
def refused(capsys, tmp_path):
    """refused(source, *flags) → the one line; and nothing is left where OUT would be, nor beside
    it."""

    def call(*argv, out=None) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert (
            cli.run(
                front.main,
                ["convert", str(argv[0]), str(out or tmp_path / "out"), *map(str, argv[1:])],
            )
            == 2
        )
        said, error = capsys.readouterr()
        assert said == "" and error.startswith("error: ") and error.count("\n") == 1, error
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return error

    return call


def checkpoint(config: TransformerConfig, path, **beside) -> OfficialPixArt:
    """An official .pth of a config, weights random; its model."""
    model = randomise(OfficialPixArt(config))
    torch.save({"state_dict": model.state_dict(), **beside}, path)
    return model


@pytest.fixture
def sigma_pth(tmp_path):
    checkpoint(SIGMA, tmp_path / "sigma.pth")
    return tmp_path / "sigma.pth"


# ---- official files, read and written ----


@pytest.mark.parametrize("kind", MODELS)
def test_pth_to_folder_to_official_file_is_exact_to_the_bit_and_loads_strictly(
    kind, tmp_path, capsys
):
    config = MODELS[kind]
    model = checkpoint(config, tmp_path / "p.pth")
    convert(capsys, tmp_path / "p.pth", tmp_path / "folder", "--heads", HEADS)
    part = load_component(tmp_path / "folder")
    assert part.config == config
    said = convert(capsys, tmp_path / "folder", tmp_path / "p.safetensors", "--format", "official")
    assert "lacks" not in said and "without" not in said

    state = safetensors.torch.load_file(tmp_path / "p.safetensors")
    OfficialPixArt(config).load_state_dict(state, strict=True)
    for key, value in model.state_dict().items():
        assert state[key].dtype == value.dtype and torch.equal(state[key], value), key

    args = inputs(config, 8, 12, [5, 2])
    assert relative_error(part.apply(**args), run_official(model, **args)) <= 1e-5

    # an official .safetensors file is read as a .pth is, and written again is the same file
    convert(capsys, tmp_path / "p.safetensors", tmp_path / "again", "--heads", HEADS)
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "null_caption.safetensors"):
        assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    convert(
        capsys,
        tmp_path / "p.safetensors",
        tmp_path / "q.safetensors",
        "--heads",
        HEADS,
        "--format",
        "official",
    )
    assert (tmp_path / "p.safetensors").read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_a_diffusers_model_becomes_an_official_file_that_says_what_it_lacks(tmp_path, capsys):
    pipe = tiny_diffusers.build(tmp_path / "model")
    said = convert(capsys, tmp_path / "model", tmp_path / "p.safetensors", "--format", "official")
    assert "without y_embedder.y_embedding" in said
    part = load_component(tmp_path / "model" / "transformer")
    model = OfficialPixArt(part.config)
    missing = model.load_state_dict(
        safetensors.torch.load_file(tmp_path / "p.safetensors"), strict=False
    )
    assert missing.missing_keys == ["y_embedder.y_embedding"] and not missing.unexpected_keys
    assert torch.equal(model.pos_embed, pipe.transformer.pos_embed.pos_embed)
    args = inputs(part.config, 8, 12, [5, 2])
    assert relative_error(part.apply(**args), run_official(model, **args)) <= 1e-5


def test_dit_becomes_an_official_file_and_back_to_the_bit(tmp_path, capsys):
    config = DiTConfig(depth=2, width=24, heads=HEADS, sample_size=8, num_classes=10)
    example = np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.float32), np.zeros(1, int)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: rng.standard_normal(s.shape, np.float32),
        abstract_params(DiT(config, {}).module, *example),
    )
    DiT(config, params).save(tmp_path / "folder")
    convert(capsys, tmp_path / "folder", tmp_path / "dit.safetensors", "--format", "official")
    tensors = open_tensors(tmp_path / "dit.safetensors")
    assert set(tensors) == {*write(dit.OFFICIAL, params), "pos_embed"} and tensors.shape(
        "pos_embed"
    ) == (1, 16, 24)
    convert(capsys, tmp_path / "dit.safetensors", tmp_path / "again", "--heads", HEADS)
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
        want = np.concatenate([np.tile(axis, (side, 1)), np.repeat(axis, side, 0)], 1).astype(
            np.float32
        )
        config = TransformerConfig.preset("XL/2", sample_size=size, position_scale=scale)
        np.testing.assert_array_equal(names.position_table(config)[0], want)


# ---- what released and trained files hold ----


def test_what_training_leaves_beside_and_around_the_weights_is_tolerated(tmp_path, capsys):
    model = randomise(OfficialPixArt(SIGMA))
    optimizer = torch.optim.AdamW(model.parameters())
    model(
        torch.zeros(1, 4, 8, 8),
        torch.zeros(1),
        torch.zeros(1, 2, 16),
        torch.ones(1, 2, dtype=torch.bool),
    ).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    state = model.state_dict()
    plain = {
        "state_dict": state,
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "epoch": 3,
    }
    # names behind "module.", and a counter
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    assert "n_averaged" in averaged
    files = {
        "plain": plain,
        "bare": state,
        "averaged": {**plain, "state_dict_ema": averaged},
        "compiled": {
            "state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}
        },
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        convert(capsys, tmp_path / f"{name}.pth", tmp_path / name, "--heads", HEADS)
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (
                tmp_path / "plain" / file
            ).read_bytes(), name


@pytest.mark.parametrize("pixels, scale", [(256, 0.5), (512, 1.0), (1024, 2.0), (2048, 4.0)])
def test_a_sigma_file_without_a_position_table_is_scaled_by_its_size(
    pixels, scale, tmp_path, capsys
):
    state = randomise(OfficialPixArt(MODELS["sigma"])).state_dict()
    del state["pos_embed"]
    torch.save({"state_dict": state}, tmp_path / "p.pth")
    for flags, want in (((), scale), (("--scale", 3), 3.0)):
        out = tmp_path / f"out{want}"
        convert(
            capsys, tmp_path / "p.pth", out, "--heads", HEADS, "--sample-size", pixels // 8, *flags
        )
        config = load_component(out).config
        assert (
            config.sample_size,
            config.position_scale,
            config.text_tokens,
            config.size_conditions,
        ) == (pixels // 8, want, 300, False)


def test_flags_that_contradict_the_file_are_named(sigma_pth, refused):
    assert "--sample-size 32: the file's own position table is of 16" in refused(
        sigma_pth, "--heads", HEADS, "--sample-size", 32
    )
    assert "its captions are of 300 tokens (PixArt-Σ)" in refused(
        sigma_pth, "--heads", HEADS, "--tokens", 120
    )
    assert "position_scale = -1.0: must be positive" in refused(
        sigma_pth, "--heads", HEADS, "--scale", -1
    )
    assert "must be a multiple of heads = 7" in refused(sigma_pth, "--heads", 7)


# ---- a PixArt-Σ is not taken for a PixArt-α ----


def test_a_sigma_file_that_does_not_say_its_captions_length_is_not_taken_for_alpha(
    tmp_path, capsys, refused
):
    state = randomise(OfficialPixArt(SIGMA)).state_dict()
    del state["y_embedder.y_embedding"]
    torch.save({"state_dict": state}, tmp_path / "p.pth")
    assert "looks like PixArt-Σ: give --tokens 300" in refused(tmp_path / "p.pth", "--heads", HEADS)
    convert(capsys, tmp_path / "p.pth", tmp_path / "told", "--heads", HEADS, "--tokens", 300)
    assert load_component(tmp_path / "told").config.text_tokens == 300

    plain = {
        key: value
        for key, value in state.items()
        if ".sr." not in key and ".norm." not in key and "_norm." not in key
    }
    # nothing in it tells the two apart: said aloud
    torch.save({"state_dict": plain}, tmp_path / "either.pth")
    assert "120 tokens, as PixArt-α's (PixArt-Σ: give --tokens 300)" in convert(
        capsys, tmp_path / "either.pth", tmp_path / "o", "--heads", HEADS
    )


def test_a_sigma_folder_of_diffusers_is_told_by_its_index_or_by_a_flag(tmp_path, capsys, refused):
    tiny_diffusers.build(tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"_class_name": "PixArtSigmaPipeline"})
    )
    convert(capsys, tmp_path / "model", tmp_path / "sigma")
    assert load_component(tmp_path / "sigma").config.text_tokens == 300
    assert "300 tokens (PixArt-Σ)" in refused(tmp_path / "model", "--tokens", 120)

    # alone, it says nothing; at 1024 px without size conditions it is no PixArt-α
    part = tmp_path / "model" / "transformer"
    (part / "config.json").write_text(
        json.dumps(
            json.loads((part / "config.json").read_text())
            | {"sample_size": 128, "use_additional_conditions": False}
        )
    )
    assert "looks like PixArt-Σ" in refused(part)
    convert(capsys, part, tmp_path / "told", "--tokens", 300)
    assert load_component(tmp_path / "told").config.text_tokens == 300


def test_a_folder_with_kv_compression_opened_without_it_is_refused(
    sigma_pth, tmp_path, capsys, refused
):
    convert(capsys, sigma_pth, tmp_path / "folder", "--heads", HEADS)
    file = tmp_path / "folder" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(
        json.dumps({key: value for key, value in values.items() if not key.startswith("kv_")})
    )
    assert "8 left over: transformer_blocks.[0,2].attn1.sr.bias" in refused(tmp_path / "folder")
    file.write_text(json.dumps({**values, "kv_compression_layers": [0]}))
    assert "4 left over: transformer_blocks.2.attn1.sr.bias" in refused(tmp_path / "folder")
    file.write_text(json.dumps({**values, "kv_compression_layers": "last"}))
    assert "kv_compression_layers" in refused(tmp_path / "folder")
    file.write_text(json.dumps({**values, "kv_compression_layers": 2}))
    assert "wrong type" in refused(tmp_path / "folder")


def test_layers_of_different_ratios_are_named(tmp_path, refused):
    state = randomise(OfficialPixArt(SIGMA)).state_dict()
    state["blocks.2.attn.sr.weight"] = torch.zeros(24, 1, 4, 4)
    torch.save({"state_dict": state}, tmp_path / "p.pth")
    assert "different ratios ([2, 4])" in refused(tmp_path / "p.pth", "--heads", HEADS)


# ---- bad input: one line, exit status 2, nothing half-written ----


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97])
def test_a_truncated_pth_is_named(legacy, share, tmp_path, refused):
    torch.save(
        {"state_dict": randomise(OfficialPixArt(SIGMA)).state_dict()},
        tmp_path / "p.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    data = (tmp_path / "p.pth").read_bytes()
    (tmp_path / "p.pth").write_bytes(data[: int(len(data) * share)])
    assert "p.pth cannot be read as a PyTorch file" in refused(tmp_path / "p.pth", "--heads", HEADS)


def test_a_truncated_safetensors_shard_is_named(sigma_pth, tmp_path, capsys, refused):
    convert(capsys, sigma_pth, tmp_path / "folder", "--heads", HEADS)
    weights = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    weights.unlink()
    keys = sorted(tensors)
    weight_map = {}
    for n, part in enumerate((keys[::2], keys[1::2]), 1):
        shard = f"diffusion_pytorch_model-{n:05}-of-00002.safetensors"
        safetensors.torch.save_file({key: tensors[key] for key in part}, weights.parent / shard)
        weight_map.update(dict.fromkeys(part, shard))
    (weights.parent / f"{weights.name}.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    shutil.copytree(weights.parent, tmp_path / "whole")
    convert(capsys, tmp_path / "whole", tmp_path / "joined")

    second = weights.parent / "diffusion_pytorch_model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-5])
    for flags in ((), ("--format", "official")):
        line = refused(
            tmp_path / "folder", *flags, out=tmp_path / "out.safetensors" if flags else None
        )
        assert second.name in line and "damaged or cut short" in line


class Payload:
    """What a malicious file holds: opening it as a pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pth_with_code_in_it_is_named_and_does_not_run(tmp_path, refused):
    mark = tmp_path / "ran"
    state = randomise(OfficialPixArt(SIGMA)).state_dict()
    for i, content in enumerate(
        (
            {"state_dict": state, "extra": Payload(mark)},
            Payload(mark),
            {"state_dict": torch.nn.Linear(2, 2)},
        )
    ):
        torch.save(content, tmp_path / f"{i}.pth")
        assert "could run code" in refused(tmp_path / f"{i}.pth", "--heads", HEADS)
        assert not mark.exists()


def test_files_of_other_kinds_are_named(tmp_path, capsys, refused):
    pipe = tiny_diffusers.build(tmp_path / "model")
    torch.save(pipe.transformer.state_dict(), tmp_path / "diffusers.pth")
    assert "has diffusers' names: give the folder" in refused(tmp_path / "diffusers.pth")
    assert "neither a PixArt transformer" in refused(
        tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    )
    (tmp_path / "notes.txt").write_text("")
    assert "weights are read from .safetensors" in refused(tmp_path / "notes.txt")
    assert "for a transformer or a DiT: the source is a VAE" in refused(
        tmp_path / "model" / "vae", "--format", "official", out=tmp_path / "o.safetensors"
    )
    assert "--tokens and --scale are for a transformer" in refused(
        tmp_path / "model" / "vae", "--scale", 2
    )


def test_a_wrong_format_is_named(sigma_pth, refused):
    line = refused(sigma_pth, "--format", "offical")
    assert "offical" in line and "official" in line and "folder" in line
    assert "writes one .safetensors file" in refused(sigma_pth, "--format", "official")


def test_an_out_that_is_there_is_named_and_stays(sigma_pth, tmp_path, refused):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    (tmp_path / "file.safetensors").write_text("keep")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "absent")
    assert "full is there already: name a new folder" in refused(
        sigma_pth, "--heads", HEADS, out=tmp_path / "full"
    )
    for name in ("file.safetensors", "link.safetensors", "full"):
        out = tmp_path / name if name != "full" else tmp_path / "full" / "mine"
        assert "is there already" in refused(sigma_pth, "--heads", HEADS, out=out)
    line = refused(
        sigma_pth, "--heads", HEADS, "--format", "official", out=tmp_path / "file.safetensors"
    )
    assert "is there already: name a new file" in line
    assert (
        (tmp_path / "full" / "mine").read_text()
        == (tmp_path / "file.safetensors").read_text()
        == "keep"
    )


def test_an_empty_folder_may_be_out(sigma_pth, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    convert(capsys, sigma_pth, tmp_path / "out", "--heads", HEADS)
    assert load_component(tmp_path / "out").config == SIGMA


def test_an_out_that_cannot_be_written_is_named(sigma_pth, tmp_path, refused):
    (tmp_path / "file").write_text("")
    for flags, name in (((), "out"), (("--format", "official"), "out.safetensors")):
        assert f"{tmp_path / 'file'} is no folder" in refused(
            sigma_pth, "--heads", HEADS, *flags, out=tmp_path / "file" / "deep" / name
        )


@pytest.mark.parametrize(
    "flags, name",
    [((), "out"), (("--format", "official"), "out.safetensors")],
    ids=["folder", "official"],
)
def test_a_disk_that_fills_while_writing_leaves_nothing(flags, name, sigma_pth, tmp_path, refused):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the system refuses to make a file grow beyond this
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        line = refused(sigma_pth, "--heads", HEADS, *flags, out=tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"cannot write {tmp_path / name}" in line

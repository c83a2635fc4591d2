"""A ControlNet's files: the official .pth with its base in it, diffusers' research folder, and the
way from each to the other, to the bit."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import torch

from pixart_jax import __main__ as front
from pixart_jax import cli, load_component
from pixart_jax.models.configs import ControlNetConfig, TransformerConfig
from pixart_jax.models.controlnet import config_of
from pixart_jax.weights import controlnet, transformer
from pixart_jax.weights.component import ControlNet, Transformer
from pixart_jax.weights.files import open_tensors
from pixart_jax.weights.table import write
from tests.models.reference import param_shapes, random_params

MODEL = TransformerConfig(depth=4, width=24, heads=3, caption_width=16, sample_size=8)
CONFIG = config_of(MODEL)


def convert(*arguments) -> int:
    return cli.run(front.main, ["convert", *map(str, arguments)])


def assert_same(part, other) -> None:
    assert part.config == other.config
    jax.tree.map(np.testing.assert_array_equal, part.params, other.params)


@pytest.fixture(scope="module")
def control() -> ControlNet:
    return ControlNet(CONFIG, random_params(ControlNet, CONFIG))


@pytest.fixture(scope="module")
def base() -> Transformer:
    return Transformer(MODEL, random_params(Transformer, MODEL, seed=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, control, base):
    """control/, base/ and official.pth, as the official trainer saves it."""
    folder = tmp_path_factory.mktemp("control")
    control.save(folder / "control")
    base.save(folder / "base")
    tensors = write(controlnet.OFFICIAL, control.params)
    own = transformer.to_official(MODEL, base.params).items()
    tensors |= {f"base_model.{key}": value for key, value in own}
    state = {key: torch.tensor(np.asarray(value)) for key, value in tensors.items()}
    moments = {"state": {0: {"exp_avg": torch.ones(3)}}}
    torch.save({"state_dict": state, "optimizer": moments, "epoch": 1}, folder / "official.pth")
    return folder


def test_the_released_models_have_the_tensors_that_the_papers_code_has():
    xl = ControlNetConfig()
    assert config_of(TransformerConfig.preset("XL/2")) == xl
    shapes = param_shapes(ControlNet, xl)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 294_917_760
    for table, count, name in (
        (controlnet.OFFICIAL, 223, "controlnet.12.copied_block.cross_attn.kv_linear.weight"),
        (controlnet.DIFFUSERS, 301, "controlnet_blocks.12.transformer_block.attn1.to_out.0.bias"),
    ):
        names = write(table, shapes)
        assert len(names) == count and name in names
        assert sum(".before_proj." in key for key in names) == 2
    assert controlnet.config_to_json(xl) == {
        "_class_name": "PixArtControlNetAdapterModel",
        "num_layers": 13,
    }


def test_a_folder_holds_the_sizes_that_diffusers_code_does_not_have(folder, control):
    assert_same(load_component(folder / "control"), control)
    assert json.loads((folder / "control" / "config.json").read_text()) == {
        "_class_name": "PixArtSigmaControlNetAdapterModel",
        "num_layers": 3,
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 24,
    }


def test_the_official_file_becomes_a_folder_and_the_folder_that_file(
    folder, control, base, tmp_path, capsys
):
    official = folder / "official.pth"
    assert convert(official, tmp_path / "made", "--heads", 3) == 0
    assert "ControlNet, " in capsys.readouterr().out
    assert_same(load_component(tmp_path / "made"), control)
    assert (
        convert(official, tmp_path / "base", "--branch", "state_dict/base_model", "--heads", 3) == 0
    )
    jax.tree.map(
        np.testing.assert_array_equal, load_component(tmp_path / "base").params, base.params
    )
    both = tmp_path / "both.safetensors"
    flags = ("--format", "official", "--base", folder / "base")
    assert convert(tmp_path / "made", both, *flags) == 0
    was, made = open_tensors(official), open_tensors(both)
    names = {key.removeprefix("state_dict/"): key for key in was if key.startswith("state_dict/")}
    assert set(made) == set(names)
    for key in made:
        np.testing.assert_array_equal(made[key], was[names[key]])
    alone = tmp_path / "alone.safetensors"
    assert convert(both, alone, "--format", "official", "--heads", 3) == 0
    assert len(open_tensors(alone)) == 2 + 17 * CONFIG.depth
    assert "without base_model" in capsys.readouterr().out


def test_a_file_of_a_released_width_opens_without_a_conversion(tmp_path):
    config = ControlNetConfig(depth=1, width=384, heads=6)
    part = ControlNet(config, random_params(ControlNet, config))
    for name, table in (("a.safetensors", controlnet.OFFICIAL), ("b.pth", controlnet.DIFFUSERS)):
        path = tmp_path / name
        tensors = {key: np.asarray(value) for key, value in write(table, part.params).items()}
        if path.suffix == ".pth":
            torch.save({key: torch.tensor(value) for key, value in tensors.items()}, path)
        else:
            part.save_official(path)
        assert_same(load_component(path), part)


def test_bad_files_are_one_line(folder, tmp_path, capsys):
    part = load_component(folder / "control")
    part.save_official(tmp_path / "file.safetensors")
    other = tmp_path / "other"
    load_component(folder / "base").replace(config=MODEL).save(other)
    cut = {key: value for key, value in write(controlnet.DIFFUSERS, part.params).items()}
    cut.pop("controlnet_blocks.1.after_proj.bias")
    config = ControlNetConfig(3, 48, 6)
    wide = ControlNet(config, random_params(ControlNet, config))
    wide.save(tmp_path / "wide")
    for arguments, message in (
        ((tmp_path / "file.safetensors", tmp_path / "x"), "at width 24? convert it with --heads"),
        (
            (
                tmp_path / "wide",
                tmp_path / "x.safetensors",
                "--format",
                "official",
                "--base",
                other,
            ),
            "of width 48 does not fit a transformer of width 24",
        ),
    ):
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

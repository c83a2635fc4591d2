"""python -m pixart_jax: commands by name, and convert from every released form."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_jax import __main__ as front
from pixart_jax import cli, load_component
from tests import tiny_diffusers

WIDTH, HEADS, DEPTH = 24, 3, 2


def refusal(capsys, argv: list[str]) -> str:
    """The one line with which a command line is refused."""
    assert cli.run(front.main, argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_help_lists_the_commands_and_every_command_has_its_own(capsys):
    assert cli.run(front.main, ["--help"]) == 0
    listed = capsys.readouterr().out
    for name in front.COMMANDS:
        assert f"  {name} " in listed
    assert cli.run(front.main, ["convert", "--help"]) == 0
    assert "--heads" in capsys.readouterr().out
    assert cli.run(front.main, []) == 2


def test_unknown_command_and_flag_name_the_nearest(capsys):
    assert "did you mean 'convert'" in refusal(capsys, ["convrt"])
    assert "did you mean '--heads'" in refusal(capsys, ["convert", "a", "b", "--head", "3"])


def test_commands_are_imported_only_when_called(root):
    heavy = {"jax", "torch", "transformers", "tyro"}
    code = (
        f"import sys, pixart_jax.__main__ as m; m.main(['--help']); assert not {heavy} & "
        "set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, env=os.environ
    )
    done = subprocess.run(
        [sys.executable, "-m", "pixart_jax", "nonsense"],
        cwd=root,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert (
        done.returncode == 2
        and done.stdout == ""
        and done.stderr.startswith("error: unknown command 'nonsense'")
    )


# ---- convert ----


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "multi-scale"])
def released(request, tmp_path_factory):
    """(diffusers' transformer, its weights under the official names)."""
    pipe = tiny_diffusers.build(
        tmp_path_factory.mktemp("model"), size_conditions=request.param, save=False
    )
    return pipe.transformer.eval(), official_names(pipe.transformer.state_dict())


def official_names(theirs: dict) -> dict:
    """diffusers' keys → those of an official .pth, by the table that PixArt's authors convert with,
    read backwards."""
    embedders = {
        "t_embedder": "timestep_embedder",
        "csize_embedder": "resolution_embedder",
        "ar_embedder": "aspect_ratio_embedder",
    }
    out = {}
    for kind in ("weight", "bias"):
        out[f"x_embedder.proj.{kind}"] = theirs[f"pos_embed.proj.{kind}"]
        for official, name in embedders.items():
            for n in (0, 1):
                if (key := f"adaln_single.emb.{name}.linear_{n + 1}.{kind}") in theirs:
                    out[f"{official}.mlp.{2 * n}.{kind}"] = theirs[key]
        out[f"t_block.1.{kind}"] = theirs[f"adaln_single.linear.{kind}"]
        for n in (1, 2):
            out[f"y_embedder.y_proj.fc{n}.{kind}"] = theirs[f"caption_projection.linear_{n}.{kind}"]
        out[f"final_layer.linear.{kind}"] = theirs[f"proj_out.{kind}"]
        for i in range(DEPTH):
            block = f"transformer_blocks.{i}"
            out[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [theirs[f"{block}.attn1.to_{x}.{kind}"] for x in "qkv"]
            )
            out[f"blocks.{i}.attn.proj.{kind}"] = theirs[f"{block}.attn1.to_out.0.{kind}"]
            out[f"blocks.{i}.cross_attn.q_linear.{kind}"] = theirs[f"{block}.attn2.to_q.{kind}"]
            out[f"blocks.{i}.cross_attn.kv_linear.{kind}"] = torch.cat(
                [theirs[f"{block}.attn2.to_{x}.{kind}"] for x in "kv"]
            )
            out[f"blocks.{i}.cross_attn.proj.{kind}"] = theirs[f"{block}.attn2.to_out.0.{kind}"]
            out[f"blocks.{i}.mlp.fc1.{kind}"] = theirs[f"{block}.ff.net.0.proj.{kind}"]
            out[f"blocks.{i}.mlp.fc2.{kind}"] = theirs[f"{block}.ff.net.2.{kind}"]
    for i in range(DEPTH):
        out[f"blocks.{i}.scale_shift_table"] = theirs[f"transformer_blocks.{i}.scale_shift_table"]
    out["final_layer.scale_shift_table"] = theirs["scale_shift_table"]
    out["y_embedder.y_embedding"] = torch.randn(120, 16, generator=torch.Generator().manual_seed(1))
    return out


def convert(capsys, *argv) -> str:
    assert cli.run(front.main, ["convert", *map(str, argv)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def assert_evaluates_as(component, theirs: PixArtTransformer2DModel):
    rng = np.random.default_rng(0)
    latents, states = (
        rng.standard_normal((2, 8, 6, 4), np.float32),
        rng.standard_normal((2, 5, 16), np.float32),
    )
    lengths, t = np.array([5, 2]), np.array([999.0, 3.0], np.float32)
    told = {}
    if theirs.config.use_additional_conditions:
        told = {
            "resolution": torch.tensor([[64.0, 48.0]] * 2),
            "aspect_ratio": torch.tensor([[64 / 48]] * 2),
        }
    with torch.no_grad():
        want = (
            theirs(
                torch.from_numpy(latents).permute(0, 3, 1, 2),
                encoder_hidden_states=torch.from_numpy(states),
                timestep=torch.from_numpy(t),
                encoder_attention_mask=torch.from_numpy(
                    (np.arange(5) < lengths[:, None]).astype(np.float32)
                ),
                added_cond_kwargs=told or {"resolution": None, "aspect_ratio": None},
            )
            .sample.permute(0, 2, 3, 1)
            .numpy()
        )
    sizes = (
        {"size": np.array([[64.0, 48.0]] * 2), "aspect_ratio": np.array([64 / 48] * 2)}
        if told
        else {}
    )
    got = np.asarray(component.apply(latents, t, states, lengths, **sizes))
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-4


def test_official_pth_becomes_a_folder_that_evaluates_as_diffusers_does(released, tmp_path, capsys):
    theirs, official = released
    torch.save({"state_dict": official, "epoch": 3}, tmp_path / "PixArt.pth")
    told = ["--heads", HEADS, "--sample-size", theirs.config.sample_size, "--scale", 1]
    said = convert(capsys, tmp_path / "PixArt.pth", tmp_path / "out", *told)
    assert "parameters" in said and "(state_dict)" in said
    component = load_component(tmp_path / "out")
    assert_evaluates_as(component, theirs)
    np.testing.assert_array_equal(
        component.params["null_caption"], official["y_embedder.y_embedding"].numpy()
    )
    # diffusers opens the very folder, and so does a second conversion.
    assert_evaluates_as(
        component, PixArtTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    )
    convert(capsys, tmp_path / "out", tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_average_is_taken_where_there_is_one_unless_told_otherwise(released, tmp_path, capsys):
    _, official = released
    average = {key: value + 1 for key, value in official.items()}
    torch.save(
        {"state_dict": official, "state_dict_ema": average, "optimizer": {"state": {}}, "epoch": 1},
        tmp_path / "p.pth",
    )
    told = [tmp_path / "p.pth", "--heads", HEADS, "--sample-size", 8]
    assert "(state_dict_ema)" in convert(capsys, told[0], tmp_path / "ema", *told[1:])
    assert "(state_dict)" in convert(capsys, told[0], tmp_path / "raw", *told[1:], "--no-ema")
    biases = [
        np.asarray(load_component(tmp_path / name).params["t_block"]["bias"])
        for name in ("ema", "raw")
    ]
    np.testing.assert_allclose(biases[0], biases[1] + 1, rtol=1e-6)


def test_position_table_tells_size_and_scale(released, tmp_path, capsys):
    from pixart_jax.models.embedders import sincos_2d

    _, official = released
    for scale in (1.0, 2.0):
        table = torch.from_numpy(sincos_2d(16, 16, WIDTH, 16, scale))[None]
        torch.save({"state_dict": {**official, "pos_embed": table}}, tmp_path / "p.pth")
        convert(capsys, tmp_path / "p.pth", tmp_path / f"out{scale}", "--heads", HEADS)
        config = load_component(tmp_path / f"out{scale}").config
        assert (config.sample_size, config.position_scale) == (32, scale)
        assert (
            json.loads((tmp_path / f"out{scale}" / "config.json").read_text())[
                "interpolation_scale"
            ]
            == scale
        )


def test_heads_are_known_for_released_widths_and_asked_for_otherwise(released, tmp_path, capsys):
    _, official = released
    torch.save({"state_dict": official}, tmp_path / "p.pth")
    assert "--heads" in refusal(
        capsys, ["convert", str(tmp_path / "p.pth"), str(tmp_path / "out"), "--sample-size", "8"]
    )
    assert not (tmp_path / "out").exists()
    from pixart_jax.weights.transformer import config_from_official

    for width, heads in ((384, 6), (768, 12), (1024, 16), (1152, 16)):
        if width % 3 and "csize_embedder.mlp.0.weight" in official:
            continue  # a multi-scale model's width is a multiple of 3
        shapes = {
            key: tuple(n * width // WIDTH if n % WIDTH == 0 else n for n in value.shape)
            for key, value in official.items()
        }
        assert config_from_official(shapes, sample_size=32).heads == heads


def test_dit_pt_becomes_a_folder(tmp_path, capsys):
    import jax
    from flax import linen as nn

    from pixart_jax.models.dit import DiTConfig
    from pixart_jax.weights import component, dit
    from pixart_jax.weights.table import write

    config = DiTConfig(depth=2, width=WIDTH, heads=HEADS, sample_size=8, num_classes=10)
    module = component.DiT(config, {}).module
    inputs = np.zeros((1, 8, 8, 4), np.float32), np.zeros((1,), np.float32), np.zeros((1,), int)
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes)
    state = {
        key: torch.from_numpy(np.array(value)) for key, value in write(dit.OFFICIAL, params).items()
    }
    torch.save(state, tmp_path / "DiT.pt")
    convert(capsys, tmp_path / "DiT.pt", tmp_path / "out", "--heads", HEADS, "--sample-size", 8)
    opened = load_component(tmp_path / "out")
    assert opened.config == config
    latents, t, labels = (
        rng.standard_normal((2, 8, 8, 4), np.float32),
        np.array([3.0, 900.0], np.float32),
        np.array([4, 10]),
    )
    np.testing.assert_array_equal(
        opened.apply(latents, t, labels), component.DiT(config, params).apply(latents, t, labels)
    )


def test_whole_diffusers_model_gives_its_transformer(tmp_path, capsys):
    pipe = tiny_diffusers.build(tmp_path / "model")
    convert(capsys, tmp_path / "model", tmp_path / "out")
    assert_evaluates_as(load_component(tmp_path / "out"), pipe.transformer)
    convert(capsys, tmp_path / "model", tmp_path / "scaled", "--scale", 2)
    assert load_component(tmp_path / "scaled").config.position_scale == 2.0


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert "does not exist" in refusal(capsys, ["convert", str(tmp_path / "absent.pth"), out])
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    assert "cut.pth" in refusal(capsys, ["convert", str(tmp_path / "cut.pth"), out])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    assert "neither a PixArt transformer" in refusal(
        capsys, ["convert", str(tmp_path / "other.pth"), out]
    )
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    assert "could run code" in refusal(capsys, ["convert", str(tmp_path / "code.pth"), out])
    tiny_diffusers.build(tmp_path / "model")
    capsys.readouterr()
    assert "already" in refusal(
        capsys, ["convert", str(tmp_path / "model"), str(tmp_path / "model")]
    )
    assert "--heads" in refusal(capsys, ["convert", str(tmp_path / "model"), out, "--heads", "3"])
    (tmp_path / "file").write_text("")
    assert "file" in refusal(
        capsys, ["convert", str(tmp_path / "model"), str(tmp_path / "file" / "out")]
    )
    assert not (tmp_path / "out").exists()

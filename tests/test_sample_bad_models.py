"""A model folder that is damaged or put together of two models: one line, exit status 2, and no
folder of images begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import T5EncoderModel

from pixart_jax import cli
from pixart_jax.commands import sample
from tests import tiny_diffusers


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def no_index(model):
    (model / "model_index.json").unlink()


def a_cut_file(model):
    cut(model / "transformer" / "diffusion_pytorch_model.safetensors")


def a_cut_shard(model):
    encoder = T5EncoderModel.from_pretrained(model / "text_encoder")
    (model / "text_encoder" / "model.safetensors").unlink()
    encoder.save_pretrained(model / "text_encoder", max_shard_size="8KB")
    shards = sorted((model / "text_encoder").glob("model-*.safetensors"))
    assert len(shards) > 1
    cut(shards[-1])


def a_missing_shard(model):
    a_cut_shard(model)
    sorted((model / "text_encoder").glob("model-*.safetensors"))[-1].unlink()


def a_cut_vae(model):
    cut(model / "vae" / "diffusion_pytorch_model.safetensors")


def sigma_in_alpha(model):
    change(model / "transformer" / "config.json", text_tokens=300)


def sigma_null_caption_in_alpha(model):
    import numpy as np
    from safetensors.numpy import save_file

    save_file(
        {"null_caption": np.zeros((300, 16), np.float32)},
        model / "transformer" / "null_caption.safetensors",
    )


def sigma_of_1024_px_in_alpha(model):
    # as the released ones say
    change(model / "transformer" / "config.json", sample_size=128, use_additional_conditions=False)


def another_text_encoder(model):
    change(model / "text_encoder" / "config.json", d_model=32)


def another_vae(model):
    change(model / "vae" / "config.json", latent_channels=16)


def no_config(model):
    (model / "vae" / "config.json").unlink()


BROKEN = {
    no_index: "has no model_index.json",
    a_cut_file: "transformer/diffusion_pytorch_model.safetensors cannot be read as safetensors, "
    "it is damaged or cut short",
    a_cut_shard: ".safetensors cannot be read as safetensors, it is damaged or cut short",
    a_missing_shard: "names 1 missing shards: model-",
    a_cut_vae: "vae/diffusion_pytorch_model.safetensors cannot be read",
    sigma_in_alpha: "names PixArtAlphaPipeline, which reads 120 tokens of a prompt, but "
    "transformer/ wants 300 (its config.json): "
    "it is a transformer of PixArtSigmaPipeline; name that one in model_index.json",
    sigma_null_caption_in_alpha: "transformer/ wants 300 (its null_caption.safetensors)",
    sigma_of_1024_px_in_alpha: "names PixArtAlphaPipeline, but transformer/ looks like "
    "PixArt-Σ's, which reads 300 tokens of a prompt",
    another_text_encoder: "text_encoder/ is of width 32, transformer/ of 16",
    another_vae: "latents of vae/ have 16 channels, those of transformer/ 4: the parts are of two "
    "models",
    no_config: "vae has no config.json",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_a_broken_model_is_one_line_and_nothing_is_begun(tiny_model, tmp_path, capsys, damage):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    damage(model)
    capsys.readouterr()
    assert cli.run(sample.main, f"--model {model} --prompt x --out {tmp_path}/out".split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert BROKEN[damage] in err
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_table_of_sizes_takes_multiples_of_8_and_names_the_next(tmp_path, capsys):
    tiny_diffusers.build(tmp_path / "model", sample_size=32)
    capsys.readouterr()
    where = f"--model {tmp_path}/model --prompt x --out {tmp_path}/out --height 201".split()
    for more, says in (
        ([], "height 201: a side must be a multiple of 8; 200 would do"),
        (["--no-binning"], "a multiple of 16"),
    ):
        assert cli.run(sample.main, [*where, *more]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and says in err
    assert not (tmp_path / "out").exists()

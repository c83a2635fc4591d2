"""LoRAs in a pipeline: diffusers' method names and meaning, exact removal, no stale caches and no
recompilation."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import PixArtAlphaPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from pixart_jax import Pipeline, cli, load_component
from pixart_jax import __main__ as front
from pixart_jax.commands import sample
from pixart_jax.errors import UserError
from pixart_jax.images import png_settings
from pixart_jax.pipeline import sampler
from pixart_jax.pipeline.lora_flags import _path_and_weight
from pixart_jax.weights import lora
from tests import tiny_diffusers

PROMPTS = ["a large red circle", "a small blue star left of a large green square"]
OPTIONS = {"steps": 3, "negative_prompt": "a star", "seed": 5}


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory) -> dict[str, Path]:
    """Adapters of the tiny model, as peft writes them."""
    pipe = PixArtAlphaPipeline.from_pretrained(tiny_model)
    found = {}
    for n, (name, options) in enumerate(
        {
            "first": {"target_modules": ["to_q", "to_k", "to_v", "linear_1", "proj"]},
            "second": {"target_modules": ["ff.net.0.proj", "to_v"], "lora_alpha": 3},
            "dora": {"target_modules": ["to_v"], "use_dora": True},
        }.items()
    ):
        config = LoraConfig(**{"r": 2, "lora_alpha": 4, **options})
        model = get_peft_model(copy.deepcopy(pipe.transformer), config)
        generator = torch.Generator().manual_seed(n)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_A" in key or "lora_B" in key:
                    parameter.normal_(generator=generator).mul_(0.1)
        found[name] = tmp_path_factory.mktemp("lora") / name
        model.save_pretrained(found[name])
    return found


@pytest.fixture
def pipe(tiny_model) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model)


def merged(pipe: Pipeline, *arguments) -> np.ndarray:
    """Images of a new pipeline with merged parameters, which has no caches yet."""
    return images(pipe.replace(transformer=pipe.transformer.with_lora(*arguments)))


def images(pipe: Pipeline) -> np.ndarray:
    return pipe(PROMPTS, **OPTIONS)


def same_parameters(a: Pipeline, b: Pipeline) -> bool:
    leaves = zip(jax.tree.leaves(a.transformer.params), jax.tree.leaves(b.transformer.params))
    return all(x is y for x, y in leaves)


def test_adapters_are_loaded_combined_and_unloaded(pipe, folders):
    base, before = pipe.replace(), images(pipe)
    pipe.load_lora_weights(folders["first"].parent, weight_name=f"first/{lora.PEFT}")
    first = images(pipe)
    assert pipe.adapters.weights == {"default_0": 1.0}
    np.testing.assert_array_equal(first, merged(base, folders["first"]))
    assert (first != before).any()

    pipe.load_lora_weights(folders["second"], adapter_name="second")
    assert pipe.adapters.weights == {"second": 1.0}  # the only active one
    np.testing.assert_array_equal(images(pipe), merged(base, folders["second"]))
    pipe.set_adapters(["default_0", "second"], [0.5, -2.0])
    both = [folders["first"], folders["second"]]
    np.testing.assert_array_equal(images(pipe), merged(base, both, [0.5, -2.0]))
    pipe.set_adapters("default_0")
    np.testing.assert_array_equal(images(pipe), first)
    pipe.set_adapters(["default_0", "second"], 0.0)
    np.testing.assert_array_equal(images(pipe), before)

    pipe.unload_lora_weights()
    assert same_parameters(pipe, base) and not pipe.adapters.loaded
    np.testing.assert_array_equal(images(pipe), before)


def test_the_images_are_those_of_diffusers_with_pefts_model(pipe, folders, tiny_model):
    pipe.load_lora_weights(folders["first"])
    theirs = PixArtAlphaPipeline.from_pretrained(tiny_model)
    theirs.set_progress_bar_config(disable=True)
    theirs.transformer = PeftModel.from_pretrained(theirs.transformer, folders["first"])
    theirs.transformer = theirs.transformer.merge_and_unload()
    noise = np.asarray(pipe.noise(0, range(2), 64, 64)[0])
    wanted, _ = tiny_diffusers.draw(theirs, PROMPTS, noise, num_inference_steps=4)
    text = pipe.encode_text(PROMPTS)
    ours = pipe.denoise(*text, noise, steps=4, times="integer")
    assert np.abs(ours - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_fusing_is_undone_exactly_or_kept_for_good(pipe, folders):
    base = pipe.replace()
    pipe.load_lora_weights(folders["first"], "first")
    pipe.load_lora_weights(folders["second"], "second")
    second = images(pipe)
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["first"])
    fused = images(pipe)
    np.testing.assert_array_equal(fused, merged(base, folders["first"], 0.5))
    pipe.unfuse_lora()
    np.testing.assert_array_equal(images(pipe), second)
    pipe.unload_lora_weights()
    assert same_parameters(pipe, base)

    pipe.load_lora_weights(folders["first"], "first")
    pipe.fuse_lora(0.5)
    pipe.unload_lora_weights()
    pipe.unfuse_lora()
    np.testing.assert_array_equal(images(pipe), fused)
    (kept,) = pipe.adapters.identity
    pipe.load_lora_weights(folders["second"], "second")
    assert pipe.adapters.identity[0] == kept and len(pipe.adapters.identity) == 2
    together = merged(base, [folders["first"], folders["second"]], [0.5, 1.0])
    assert np.abs(images(pipe) - np.float32(together)).max() <= 1  # two sums instead of one


def test_with_adapters_shares_the_base_and_recompiles_nothing(pipe, folders):
    images(pipe)
    programs = sampler.generate_jit._cache_size()
    pipe.load_lora_weights(folders["first"], "first")
    pipe.load_lora_weights(folders["second"], "second")
    before = images(pipe)
    other = pipe.with_adapters({"first": 0.3, "second": 1.0})
    changed = images(other)
    assert (changed != before).any()
    assert sampler.generate_jit._cache_size() == programs
    np.testing.assert_array_equal(images(pipe), before)
    plain = other.with_adapters({})
    params, theirs = plain.transformer.params, other.transformer.params
    assert plain.transformer is pipe.adapters.base
    assert theirs["blocks"]["table"] is params["blocks"]["table"]
    assert theirs["blocks"]["mlp"]["fc2"]["kernel"] is params["blocks"]["mlp"]["fc2"]["kernel"]


def test_negative_prompts_are_encoded_again_for_other_adapters(pipe, folders):
    """Their keys and values are cached, and depend on the adapters."""
    images(pipe)
    kept = set(pipe._negatives)
    pipe.load_lora_weights(folders["first"])
    images(pipe)
    assert len(set(pipe._negatives) - kept) == 1
    pipe.unload_lora_weights()
    images(pipe)
    assert len(pipe._negatives) == 2  # that of the base is still there


def test_a_replaced_part_keeps_the_adapters_and_a_new_transformer_has_none(pipe, folders):
    pipe.load_lora_weights(folders["first"])
    assert pipe.replace(context_attention="ring").adapters is pipe.adapters
    assert not pipe.replace(transformer=pipe.transformer).adapters.loaded


def test_a_saved_pipeline_has_the_active_adapters_in_its_transformer(pipe, folders, tmp_path):
    pipe.load_lora_weights(folders["first"])
    pipe.save_pretrained(tmp_path)
    again = Pipeline.from_pretrained(tmp_path)
    np.testing.assert_array_equal(images(again), images(pipe))
    assert PixArtAlphaPipeline.from_pretrained(tmp_path).transformer is not None


def test_an_lcm_adapter_is_sampled_in_four_steps_when_asked_for(pipe, folders):
    """An adapter holds no scheduler: the solver is the caller's, and brings its own steps."""
    pipe.load_lora_weights(folders["first"])
    seen: list[int] = []
    pipe(PROMPTS, solver="lcm", guidance=1.0, callback=lambda step, latents: seen.append(step))
    assert seen == [0, 1, 2, 3]


def test_what_cannot_be_combined_is_one_line(pipe, folders):
    for call, match in (
        (lambda: pipe.set_adapters("style"), "no adapter 'style' is loaded: load_lora_weights"),
        (lambda: pipe.load_lora_weights(folders["dora"] / "x"), "no such adapter"),
    ):
        with pytest.raises(UserError, match=match):
            call()
    pipe.load_lora_weights(folders["first"], "first")
    pipe.load_lora_weights(folders["dora"], "dora")
    before = pipe.transformer
    for call, match in (
        (lambda: pipe.load_lora_weights(folders["second"], "first"), "'first' is loaded already"),
        (lambda: pipe.set_adapters(["first", "second"]), "no adapter 'second' is loaded"),
        (lambda: pipe.set_adapters(["first", "dora"], [1.0]), "1 weights for 2 adapters"),
        (lambda: pipe.set_adapters("first", float("nan")), "weight of 'first' must be a finite"),
        (lambda: pipe.set_adapters(["first", "dora"]), "DoRA adapter cannot be added to others"),
    ):
        with pytest.raises(UserError, match=match):
            call()
        assert pipe.transformer is before and pipe.adapters.weights == {"dora": 1.0}


# ---- programs ----


def run(model: Path, out: Path, *flags) -> int:
    common = ["--model", model, "--out", out, "--prompt", PROMPTS[0], "--steps", 2]
    return cli.run(sample.main, [str(flag) for flag in (*common, *flags)])


def test_sample_draws_with_adapters_and_records_them(pipe, folders, tiny_model, tmp_path, capsys):
    adapters = ("--lora", f"{folders['first']}:0.5", "--lora", folders["second"])
    assert run(tiny_model, tmp_path, *adapters) == 0
    (file,) = tmp_path.iterdir()
    for name in ("first", "second"):
        pipe.load_lora_weights(folders[name], name)
    pipe.set_adapters(["first", "second"], [0.5, 1.0])
    with Image.open(file) as image:
        np.testing.assert_array_equal(image, pipe(PROMPTS[0], steps=2)[0])
    recorded = [(a["name"], a["hash"], a["weight"]) for a in png_settings(file)["lora"]]
    hashes = [digest for digest, _ in pipe.adapters.identity]
    assert recorded == [("first", hashes[0], 0.5), ("second", hashes[1], 1.0)]

    capsys.readouterr()
    assert run(tiny_model, tmp_path, *adapters) == 0
    assert "already there" in capsys.readouterr().out
    assert run(tiny_model, tmp_path, "--lora", folders["first"]) == 0
    assert run(tiny_model, tmp_path) == 0
    written = [png_settings(path) for path in tmp_path.iterdir()]
    assert [len(settings.get("lora", ())) for settings in written].count(0) == 1
    assert len(written) == 3


def test_adapters_that_sample_cannot_use_are_one_line(folders, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    for flags, line in (
        (["--lora", tmp_path / "missing"], "no such adapter"),
        (["--lora", f"{folders['first']}:nan"], "the weight a finite number"),
        (["--lora", folders["first"], "--lora", folders["dora"]], "cannot be added to others"),
    ):
        assert run(tiny_model, out, *flags) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and line in error and "\n" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    "text, path, weight",
    [("a/b", "a/b", 1.0), ("a:b:-.5", "a:b", -0.5), ("gs://a/b", "gs://a/b", 1.0)],
)
def test_a_weight_is_what_follows_the_last_colon(text, path, weight):
    assert _path_and_weight(text) == (path, weight)


def convert(*argv) -> int:
    return cli.run(front.main, ["convert", *map(str, argv)])


@pytest.mark.parametrize("name", ["first", "dora"])
def test_convert_writes_peft_and_diffusers_layouts(folders, pipe, tiny_model, tmp_path, name):
    """From peft's folder, and back from diffusers' file alone."""
    assert convert(folders[name], tmp_path / "a", "--base", tiny_model) == 0
    written = tmp_path / "a" / lora.DIFFUSERS
    assert convert(written, tmp_path / "b", "--base", tiny_model / "transformer") == 0
    digests = {
        lora.read(path, pipe.transformer.params).digest
        for path in (folders[name], tmp_path / "a", written, tmp_path / "b")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_convert_writes_adapters_in_half_the_bytes(folders, pipe, tiny_model, tmp_path, dtype):
    half = ("--base", tiny_model, "--dtype", dtype)
    assert convert(folders["first"], tmp_path / "half", *half) == 0
    size = {n: (tmp_path / "half" / n).stat().st_size for n in (lora.PEFT, lora.DIFFUSERS)}
    assert size[lora.PEFT] < 0.7 * (folders["first"] / lora.PEFT).stat().st_size
    trees = (
        lora.read(path, pipe.transformer.params).tree
        for path in (folders["first"], tmp_path / "half")
    )
    for whole, rounded in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_allclose(rounded, whole, rtol=2**-8)


def test_convert_merges_adapters_into_a_model(folders, pipe, tiny_model, tmp_path):
    adapters = ("--lora", folders["first"], "--lora", f"{folders['second']}:-0.5")
    assert convert(tiny_model, tmp_path / "merged", *adapters) == 0
    part, both = load_component(tmp_path / "merged"), [folders["first"], folders["second"]]
    wanted = pipe.transformer.with_lora(both, [1.0, -0.5])
    jax.tree.map(np.testing.assert_array_equal, part.params, wanted.params)


def test_convert_refuses_adapters_in_one_line(folders, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    for argv, line in (
        ((folders["first"], out), "another model.*--base names"),
        ((folders["first"], out.with_suffix(".safetensors"), "--format", "official"), "is a LoRA"),
        ((tiny_model / "vae", out, "--lora", folders["first"]), "--lora is for a transformer"),
    ):
        assert convert(*argv) == 2
        error = capsys.readouterr().err.strip()
        assert re.match(rf"error: .*{line}[^\n]*$", error)
    assert not any(tmp_path.iterdir())

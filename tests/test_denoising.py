"""The compiled core beside the plain path: what is made once, before the scan, gives the image that
making it at every step gives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import Pipeline, diffusion
from pixart_jax.pipeline import PromptEncoder, SamplingConfig, sampler
from pixart_jax.pipeline.pipeline import Run
from tests import tiny_diffusers

PROMPTS = ["a large red circle", "a small blue star left of a large green square", "circle"]


@pytest.fixture(scope="module", params=["plain", "multi-scale"])
def pipe(request, tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_diffusers.build(folder, size_conditions=request.param == "multi-scale")
    return Pipeline.from_pretrained(folder)


def plain_path(pipe: Pipeline, prompts, noise, steps: int, guidance: float):
    """(latents, images in [-1, 1]): the whole transformer at every step, for each half of guidance
    by itself, then the VAE by itself."""
    states, lengths = pipe.encode_text(prompts)
    empty, empty_lengths = pipe.encode_text([""] * len(prompts), states.shape[1])
    height, width = (side * pipe.factor for side in noise.shape[1:3])
    told = {}
    if pipe.transformer.config.size_conditions:
        told["size"] = np.tile([float(height), float(width)], (len(prompts), 1))
        told["aspect_ratio"] = np.full(len(prompts), height / width)

    def denoiser(x, t):
        toward = pipe.transformer.apply(x, t, states, lengths, **told)
        away = pipe.transformer.apply(x, t, empty, empty_lengths, **told)
        return away[..., :4] + guidance * (toward - away)[..., :4]

    latents = diffusion.sample(denoiser, noise, steps=steps)
    return latents, pipe.vae.decode(latents / pipe.vae.config.scaling_factor)


def test_the_image_is_that_of_the_plain_path(pipe):
    noise, _ = pipe.noise(5, range(3), 64, 48)
    latents, images = plain_path(pipe, PROMPTS, noise, steps=8, guidance=4.5)
    states, lengths = pipe.encode_text(PROMPTS)
    found = pipe.denoise(states, lengths, noise, steps=8)
    assert np.abs(found - latents).max() <= 1e-5 * np.abs(latents).max()
    drawn = pipe(PROMPTS, steps=8, seed=5, height=64, width=48, binning=False, guidance=4.5)
    want = np.clip(np.asarray(images) / 2 + 0.5, 0, 1) * 255
    # rounded to whole numbers, and nothing else
    assert np.abs(drawn - want).max() <= 0.5 + 1e-5 * 255


def lowered(pipe: Pipeline, monkeypatch, **how):
    """The program that a drawing runs, as lowered, and its latents."""
    run, seen = sampler.generate_jit, []

    def watched(*arguments):
        seen.append(run.lower(*arguments))
        return run(*arguments)

    monkeypatch.setattr(sampler, "generate_jit", watched)
    pipe(PROMPTS[:2], binning=False, height=64, width=64, **how)
    return seen[0]


@pytest.mark.usefixtures("optimized")
def test_one_program_draws_from_noise_to_pixels_in_the_memory_of_the_noise(pipe, monkeypatch):
    made = lowered(pipe, monkeypatch, steps=3)
    latents, images, good = made.out_info
    assert images.shape == (2, 64, 64, 3) and latents.shape == (2, 8, 8, 4)
    assert good.shape == (2,) and good.dtype == bool
    assert images.dtype == jnp.float32  # rounded after the fit to the size that was asked for
    assert made.as_text().count("tf.aliasing_output") == 1  # latents, noise
    memory = made.compile().memory_analysis()
    assert memory.alias_size_in_bytes == 2 * 8 * 8 * 4 * 4


def test_a_step_of_the_scan_computes_no_text_and_no_time(pipe):
    """The time's cosines stand before the loop; in it are the products of ``denoise``, which is
    given time and text, and no others."""
    states, lengths = pipe.encode_text(PROMPTS[:2])
    noise, _ = pipe.noise(0, range(2), 64, 64)
    sizes, text = pipe._size_conditions(noise, None, None), (states, lengths)
    config, params = SamplingConfig(steps=3).with_defaults(), pipe.transformer.params
    spec, table, _ = pipe._spec(Run(config), True, False, None)
    arguments = (params, table, noise, None, text, text, *sizes, np.full(2, 4.5, "f"))
    made = jax.make_jaxpr(sampler.sample_latents, static_argnums=0)(spec, *arguments)
    (loop,) = [e for e in made.eqns if e.primitive.name == "scan" and e.params["length"] == 3]

    apply = functools.partial(pipe.transformer.module.apply, {"params": pipe.transformer.params})
    given = () if sizes[0] is None else (np.ones((4, 2)), np.ones(4))
    times = apply(np.float32([500.0]), *given, method="encode_times")
    text = apply(*(jnp.concatenate([a, a]) for a in (states, lengths)), method="encode_text")
    denoise = functools.partial(apply, method="denoise")
    first = jax.tree.map(lambda a: a[0], times)
    bare = jax.make_jaxpr(denoise)(jnp.concatenate([noise, noise]), first, text)
    whole, inside, alone = str(made), str(loop.params["jaxpr"]), str(bare)
    assert " cos " in whole and " cos " not in inside and " cos " not in alone
    assert inside.count("dot_general[") == alone.count("dot_general[") < whole.count("dot_general[")


def test_an_empty_negative_prompt_is_read_once_by_a_process(tiny_model, monkeypatch):
    pipe = Pipeline.from_pretrained(tiny_model)
    texts, batch = [], PromptEncoder.batch

    def watched(self, given, *rest):
        texts.extend(given)
        return batch(self, given, *rest)

    monkeypatch.setattr(PromptEncoder, "batch", watched)
    first = pipe(PROMPTS, steps=2, batch_size=1)
    np.testing.assert_array_equal(pipe(PROMPTS, steps=2, batch_size=1), first)
    assert texts.count("") == 1 and len(texts) == 1 + 2 * len(PROMPTS)
    scaled = jax.tree.map(lambda a: a * 1.1, pipe.transformer.params)
    other = pipe.replace(transformer=pipe.transformer.replace(params=scaled))
    assert not np.array_equal(other(PROMPTS, steps=2, batch_size=1), first)
    assert texts.count("") == 2, "another transformer has other keys and values"


@pytest.mark.parametrize("null", ["text", "embedding"])
def test_a_negative_prompt_that_all_share_is_what_each_image_with_its_own_gets(tiny_model, null):
    pipe = Pipeline.from_pretrained(tiny_model)
    caption = np.random.default_rng(0).normal(size=(120, 16)).astype(np.float32)
    params = {**pipe.transformer.params, "null_caption": caption}
    pipe = pipe.replace(transformer=pipe.transformer.replace(params=params))
    how = {"steps": 3, "null": null, "height": 64, "width": 64}
    how |= {"batch_size": 4, "text_length": 32}
    alone = np.concatenate([pipe([prompt], indices=[n], **how) for n, prompt in enumerate(PROMPTS)])
    mixed = pipe([*PROMPTS, "zebra"], negative_prompt=["", "", "", "a star"], **how)[:3]
    assert np.abs(alone.astype(int) - mixed).max() <= 1
    assert np.abs(alone.astype(int) - pipe(PROMPTS, **how)).max() <= 1


@pytest.mark.parametrize("pipe", ["plain"], indirect=True)
def test_decoding_in_parts_gives_the_images_of_the_whole(pipe, monkeypatch):
    from pixart_jax.pipeline import decoder

    latents = np.random.default_rng(1).normal(size=(4, 8, 8, 4)).astype(np.float32)
    whole = np.asarray(pipe.decode(latents)).astype(int)
    monkeypatch.setattr(decoder, "_PIXELS", 64 * 64)
    spec = pipe._decode_spec(4)
    run = jax.jit(lambda params, latents: decoder.decode_latents(spec, params, latents))
    parts = decoder.fit(run(pipe.vae.params, latents))
    assert np.abs(np.asarray(parts) - whole).max() <= 1


@pytest.mark.parametrize("pipe", ["plain"], indirect=True)
def test_a_callback_and_tiles_draw_the_same_image_in_two_programs(pipe):
    seen = []
    how = {"steps": 3, "height": 64, "width": 64, "binning": False}
    one = pipe(PROMPTS[:1], **how).astype(int)
    two = pipe(PROMPTS[:1], callback=lambda step, latents: seen.append(step), **how)
    assert seen == [0, 1, 2] and np.abs(one - two).max() <= 1

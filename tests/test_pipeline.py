"""The Pipeline draws what diffusers' PixArtAlphaPipeline draws, and no image depends on its batch,
its padding or its caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, LCMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.image_processor import PixArtImageProcessor
from diffusers.schedulers import scheduling_lcm

from pixart_jax import Pipeline
from pixart_jax.errors import UserError
from pixart_jax.pipeline import SamplingConfig, decoder
from pixart_jax.text import tokenize
from tests import tiny_diffusers

PROMPTS = [
    "a large red circle",
    "a small blue star left of a large green square and above the yellow circle",
    "zebra",
]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels over the range 255; 99 for equal images."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return 99.0 if error == 0 else 10 * np.log10(255**2 / error)


def opened(pipeline, folder):
    """A pipeline of diffusers, quiet."""
    theirs = pipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def with_params(pipe: Pipeline, **params) -> Pipeline:
    """The pipeline with some of the transformer's parameters replaced."""
    transformer = pipe.transformer
    return pipe.replace(transformer=transformer.replace(params={**transformer.params, **params}))


def noise_for(pipe: Pipeline, count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.asarray(pipe.noise(seed, range(count), height, width)[0])


@pytest.fixture(scope="module", params=["epsilon", "v"])
def pair(request, tmp_path_factory):
    """(diffusers' pipeline, ours, the folder), once for each prediction."""
    folder = tmp_path_factory.mktemp(f"tiny_{request.param}")
    theirs = tiny_diffusers.build(folder, request.param)
    return theirs, Pipeline.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_diffusers.build(folder)
    return Pipeline.from_pretrained(folder)


def assert_draws_the_same(
    theirs, pipe: Pipeline, prompts, height=64, width=64, negative="", steps=20, guidance=4.5
):
    noise = noise_for(pipe, len(prompts), height, width)
    how = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative}
    want_latents, want = tiny_diffusers.draw(theirs, prompts, noise, **how)
    text, negatives = (pipe.encode_text(t) for t in (prompts, [negative] * len(prompts)))
    how = {"steps": steps, "guidance": guidance, "times": "integer"}
    latents = np.asarray(pipe.denoise(*text, noise, *negatives, **how))
    error = np.linalg.norm(latents - want_latents) / np.linalg.norm(want_latents)
    assert error < 1e-4, error
    how |= {"height": height, "width": width, "binning": False}
    images = pipe(prompts, negative_prompt=negative, **how)
    assert images.shape == want.shape and images.dtype == np.uint8
    assert np.ptp(images.astype(int)) > 20  # a flat picture would prove nothing
    values = [psnr(a, b) for a, b in zip(images, want, strict=True)]
    assert min(values) >= 45, values


@pytest.mark.parametrize(
    "count, height, width, how",
    [
        (3, 64, 64, {}),
        (2, 48, 96, {"negative": "a red star", "steps": 7, "guidance": 3.0}),
        (1, 64, 64, {"steps": 5, "guidance": 1.0}),
    ],
    ids=["20 steps", "oblong, under a negative prompt", "without guidance"],
)
def test_gives_the_image_of_diffusers(pair, count, height, width, how):
    assert_draws_the_same(*pair[:2], PROMPTS[:count], height, width, **how)


def test_model_with_size_conditions_is_told_the_images_size(tmp_path):
    theirs = tiny_diffusers.build(tmp_path, size_conditions=True)
    pipe = Pipeline.from_pretrained(tmp_path)
    assert pipe.transformer.config.sample_size * pipe.factor == 1024
    assert_draws_the_same(theirs, pipe, PROMPTS[:2], 64, 96, steps=5)
    states, lengths = pipe.encode_text(PROMPTS[:2])
    noise = noise_for(pipe, 2, 64, 96)
    own = {"size": [[64.0, 96.0]] * 2, "aspect_ratio": [64 / 96] * 2}
    drawn, again, other = (
        np.asarray(pipe.denoise(states, lengths, noise, steps=5, **told))
        for told in ({}, own, {"aspect_ratio": [1.0] * 2})
    )
    np.testing.assert_array_equal(drawn, again)
    assert np.abs(drawn - other).max() > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_saved_folder_opens_in_diffusers_and_draws_the_same(tmp_path, prediction):
    tiny_diffusers.build(tmp_path / "first", prediction)
    Pipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    theirs = opened(PixArtAlphaPipeline, tmp_path / "second")
    ours = Pipeline.from_pretrained(tmp_path / "second")
    assert_draws_the_same(theirs, ours, PROMPTS)


def test_saving_over_a_saved_folder_replaces_its_parts_and_keeps_other_files(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "transformer" / "stale.safetensors").write_text("old")
    ours.save_pretrained(tmp_path)
    names = ["README.md", "model_index.json", "sampling_config.json", "scheduler", "text_encoder"]
    names += ["tokenizer", "transformer", "vae"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert not (tmp_path / "transformer" / "stale.safetensors").exists()
    again = Pipeline.from_pretrained(tmp_path)(PROMPTS[0], steps=2)
    np.testing.assert_array_equal(again, ours(PROMPTS[0], steps=2))


def test_shipped_folder_gives_what_diffusers_gives_from_it(root):
    shipped = root / "assets" / "shapes"
    theirs = opened(PixArtAlphaPipeline, shipped)
    pipe, prompts = Pipeline.from_pretrained(shipped), ["a large red star left of a small circle"]
    prompts += ["a small green square", "a large yellow circle"]
    side = pipe.transformer.config.sample_size * pipe.factor
    assert_draws_the_same(theirs, pipe, prompts, side, side, negative="a red circle")


@pytest.mark.parametrize("solver", ["dpm++", "sa"])
def test_an_image_does_not_depend_on_its_batch(ours, solver):
    """Alone, in one batch, in batches with a padded last one: the same image to one level of 255
    (fp32 sums in another order)."""
    how = {"steps": 5, "solver": solver, "seed": 7}
    together = ours(PROMPTS + PROMPTS[:2], **how).astype(int)
    assert np.abs(together - ours(PROMPTS + PROMPTS[:2], batch_size=2, **how)).max() <= 1
    for n, prompt in enumerate(PROMPTS):
        alone = ours([prompt], indices=[n], **how)
        assert np.abs(together[n] - alone[0]).max() <= 1
    # the same prompt, another place: other noise
    assert np.abs(together[0] - together[3]).max() > 1


def test_text_padding_changes_nothing(ours):
    states, lengths = ours.encode_text(PROMPTS[:2])
    long_states, long_lengths = ours.encode_text(PROMPTS[:2], 64)
    np.testing.assert_array_equal(lengths, long_lengths)
    assert states.shape[1] == 16 and long_states.shape[1] == 64
    for n, count in enumerate(np.asarray(lengths)):
        np.testing.assert_allclose(states[n, :count], long_states[n, :count], rtol=1e-4, atol=1e-5)
    noise = noise_for(ours, 2, 64, 64)
    short = np.asarray(ours.denoise(states, lengths, noise, steps=4))
    # What stands in the padding is not read: here it is as wrong as it can be.
    poisoned = jnp.where(jnp.arange(64)[None, :, None] < lengths[:, None, None], long_states, 1e3)
    long = np.asarray(ours.denoise(poisoned, lengths, noise, steps=4))
    assert np.linalg.norm(short - long) / np.linalg.norm(short) < 1e-4


def test_negative_states_of_another_length_are_padded(ours):
    states, lengths = ours.encode_text(PROMPTS[:2])
    noise = noise_for(ours, 2, 64, 64)
    default = ours.denoise(states, lengths, noise, steps=4)
    given = ours.denoise(states, lengths, noise, *ours.encode_text(["", ""], 8), steps=4)
    np.testing.assert_allclose(default, given, rtol=1e-3, atol=1e-4)


def test_null_embedding_is_the_stored_caption_under_the_prompts_length(ours):
    null = np.asarray(jax.random.normal(jax.random.key(0), (120, 16)))
    pipe = with_params(ours, null_caption=jnp.asarray(null))
    noise = noise_for(pipe, 1, 64, 64)
    states, lengths = pipe.encode_text(PROMPTS[:1])
    core = pipe.denoise(states, lengths, noise, null[None, : states.shape[1]], lengths, steps=3)
    embedding = pipe(PROMPTS[0], steps=3, null="embedding")
    # two programs, which round apart
    assert np.abs(np.asarray(pipe.decode(core)).astype(int) - embedding).max() <= 1
    assert np.abs(embedding.astype(int) - pipe(PROMPTS[0], steps=3)).max() > 1
    # A negative prompt with words counts as it is, whichever null is chosen.
    how = {"negative_prompt": "a red star", "steps": 3}
    np.testing.assert_array_equal(
        pipe(PROMPTS[0], null="embedding", **how), pipe(PROMPTS[0], **how)
    )


def test_null_embedding_without_a_stored_caption_is_refused(ours):
    assert "null_caption" not in ours.transformer.params
    with pytest.raises(UserError, match="null caption"):
        ours(PROMPTS[0], steps=2, null="embedding")


def test_stochastic_solvers_add_noise_only_with_keys(ours):
    states, lengths = ours.encode_text(PROMPTS[:1])
    noise, keys = ours.noise(0, [0], 64, 64)
    plain, again, noisy = (
        np.asarray(ours.denoise(states, lengths, noise, steps=4, solver="sa", keys=given))
        for given in (None, None, keys)
    )
    np.testing.assert_array_equal(plain, again)
    assert np.abs(plain - noisy).max() > 1e-3


def test_callback_sees_every_step_and_only_real_images(ours):
    how = {"steps": 4, "batch_size": 2}
    seen = [], [], [], []
    images = ours(PROMPTS, callback=lambda step, latents: seen[step].append(latents.shape), **how)
    assert seen == ([(2, 8, 8, 4), (1, 8, 8, 4)],) * 4
    np.testing.assert_array_equal(images, ours(PROMPTS, **how))
    # Another callback, the same program.
    other: list[int] = []
    ours(PROMPTS, callback=lambda step, latents: other.append(step), **how)
    assert sorted(other) == [0, 0, 1, 1, 2, 2, 3, 3]
    other.clear()
    seldom = ours(PROMPTS, callback=lambda step, _: other.append(step), callback_every=3, **how)
    assert other == [2, 2]
    np.testing.assert_array_equal(images, seldom)
    # The last x_0 that dpm++ sees is close to what it ends with, so a preview converges to the
    # image.
    last: dict[int, np.ndarray] = {}
    text, noise = ours.encode_text(PROMPTS[:2]), noise_for(ours, 2, 64, 64)
    latents = ours.denoise(*text, noise, steps=4, callback=last.__setitem__)
    assert np.linalg.norm(last[3] - latents) < np.linalg.norm(last[0] - latents)


ON_A_MESH = """
import sys
import numpy as np
from pixart_jax import Pipeline
from pixart_jax.config import MeshConfig
from pixart_jax.parallel.mesh import make_mesh

folder, out, *prompts = sys.argv[1:]
pipe = Pipeline.from_pretrained(folder, mesh=make_mesh(MeshConfig(data=2, fsdp=2)))
seen = []
images = pipe(prompts, steps=5, seed=4, solver="sa", callback=lambda step, latents: seen.append((step, latents.shape)))
assert sorted(seen) == [(n, (5, 8, 8, 4)) for n in range(5)], seen
np.save(out, images)
"""  # noqa: E501


def test_the_same_images_on_a_mesh_of_four_devices(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    prompts = PROMPTS + PROMPTS[:2]
    argv = [str(tmp_path), str(tmp_path / "images.npy"), *prompts]
    subprocess.run([sys.executable, "-c", ON_A_MESH, *argv], env=env, check=True)
    one = ours(prompts, steps=5, seed=4, solver="sa").astype(int)
    assert np.abs(one - np.load(tmp_path / "images.npy")).max() <= 1


def test_one_executable_for_all_batches_and_for_other_parameters(ours):
    from pixart_jax.pipeline.sampler import generate_jit

    ours(PROMPTS, steps=5, batch_size=2, seed=0)
    before = generate_jit._cache_size()
    ours(PROMPTS * 2, steps=5, batch_size=2, seed=9, guidance=2.0, negative_prompt="a star")
    changed = jax.tree.map(lambda x: x * 1.01, ours.transformer.params)
    with_params(ours, **changed)(PROMPTS, steps=5, batch_size=2)
    assert generate_jit._cache_size() == before


def test_prompts_are_cleaned_as_diffusers_cleans_them_unless_asked_not_to(pair):
    theirs, ours, _ = pair
    dirty = "<b>A red</b> circle, see www.circles.com"
    plain = {"do_classifier_free_guidance": False, "clean_caption": True}
    embeds, mask, _, _ = theirs.encode_prompt(dirty, **plain)
    states, (count,) = ours.encode_text([dirty])
    assert count == int(mask.sum())
    want = embeds[0, :count].detach().numpy()
    np.testing.assert_allclose(states[0, :count], want, rtol=1e-4, atol=1e-5)
    clean, left = (ours(dirty, steps=2, clean_caption=wanted) for wanted in (True, False))
    np.testing.assert_array_equal(clean, ours("a red circle, see", steps=2))
    assert (clean != left).any()


def test_a_size_between_the_buckets_is_drawn_at_the_nearest_and_fitted_as_diffusers_does(tmp_path):
    theirs = tiny_diffusers.build(tmp_path, sample_size=32)
    pipe = Pipeline.from_pretrained(tmp_path)
    height, width = 200, 312
    noise = noise_for(pipe, 1, 208, 304)
    given = torch.from_numpy(np.array(noise)).permute(0, 3, 1, 2)
    how = {"num_inference_steps": 3, "latents": given, "height": height, "width": width}
    how |= {"output_type": "np", "clean_caption": False}
    want = (theirs(PROMPTS[0], **how).images * 255).round()
    found = pipe(PROMPTS[0], height=height, width=width, steps=3, times="integer")
    assert found.shape == want.shape == (1, height, width, 3)
    assert psnr(found, want) >= 45
    plain = pipe(PROMPTS[0], height=208, width=320, steps=2, binning=False)
    assert plain.shape == (1, 208, 320, 3)
    with pytest.raises(UserError, match="height 201: .*multiple of 8; 200 would do"):
        pipe(PROMPTS[0], height=201, width=312)
    with pytest.raises(UserError, match="height 200: .*multiple of 16"):
        pipe(PROMPTS[0], height=200, width=312, binning=False)


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (33, 200), (16, 16)])
def test_images_are_fitted_as_diffusers_fits_them(size):
    images = np.random.default_rng(0).standard_normal((2, 48, 80, 3)).astype(np.float32)
    given = torch.from_numpy(images).permute(0, 3, 1, 2)
    want = PixArtImageProcessor.resize_and_crop_tensor(given, size[1], size[0])
    found = decoder.resize_and_crop(jnp.asarray(images), *size)
    np.testing.assert_allclose(found, want.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_a_model_names_its_own_guidance(ours, tmp_path):
    ours.replace(sampling=SamplingConfig(guidance=2.0)).save_pretrained(tmp_path)
    named = Pipeline.from_pretrained(tmp_path)
    assert named.sampling == SamplingConfig(guidance=2.0).with_defaults()
    np.testing.assert_array_equal(
        named(PROMPTS[:1], steps=2), ours(PROMPTS[:1], steps=2, guidance=2.0)
    )
    # 4.5 where none is named
    np.testing.assert_array_equal(
        named(PROMPTS[:1], steps=2, guidance=4.5), ours(PROMPTS[:1], steps=2)
    )
    for text, says in (
        ('{"guidance": "high"}', "sampling_config.json: guidance 'high': a finite number"),
        ('{"guidnace": 2}', "sampling_config.json.*guidance, steps, solver.*guidnace"),
    ):
        (tmp_path / "sampling_config.json").write_text(text)
        with pytest.raises(UserError, match=says):
            Pipeline.from_pretrained(tmp_path)
    (tmp_path / "sampling_config.json").unlink()
    assert Pipeline.from_pretrained(tmp_path).sampling.guidance == 4.5


def test_a_sigma_folder_reads_300_tokens_and_draws_what_diffusers_draws(tmp_path):
    parts = tiny_diffusers.build().components
    theirs = PixArtSigmaPipeline(**parts)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "sigma")
    pipe = Pipeline.from_pretrained(tmp_path / "sigma")
    assert pipe.transformer.config.text_tokens == 300
    long = "a large red circle left of the small blue star and " * 15
    assert 120 < int(pipe.encode_text([long])[1][0]) < 300
    assert_draws_the_same(theirs, pipe, [long, PROMPTS[0]], steps=5)
    pipe.save_pretrained(saved := tmp_path / "saved")
    assert read(saved / "model_index.json")["_class_name"] == "PixArtSigmaPipeline"
    again = opened(PixArtSigmaPipeline, saved)
    assert_draws_the_same(again, Pipeline.from_pretrained(saved), [long, PROMPTS[0]], steps=5)


@pytest.mark.parametrize(
    "scheduler, steps, theirs_how",
    [
        (LCMScheduler, 4, {"num_inference_steps": 4}),
        # a DDPM step at time 400, as the official code samples a distilled checkpoint
        (DDPMScheduler, 1, {"num_inference_steps": 1, "timesteps": [400]}),
    ],
    ids=["lcm", "dmd"],
)
def test_distilled_models_give_what_diffusers_gives(
    tmp_path, monkeypatch, scheduler, steps, theirs_how
):
    """An LCM folder without a word about steps, solver or guidance; both add the same noise."""
    theirs = tiny_diffusers.build(tmp_path)
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    theirs.scheduler = scheduler(**betas, **({} if steps == 4 else {"clip_sample": False}))
    theirs.save_pretrained(tmp_path)
    pipe, how = Pipeline.from_pretrained(tmp_path), {"solver": "dmd", "guidance": 1.0}
    if steps == 4:
        how = {"times": "integer"}
        assert pipe.sampling == SamplingConfig(4, 1.0, "lcm").with_defaults()
    noise, keys = pipe.noise(0, range(2), 64, 64)
    step = iter(range(4))

    def same_noise(*_, **__):
        here = next(step)
        fold = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, here), (8, 8, 4)))
        return torch.from_numpy(np.array(fold(keys))).permute(0, 3, 1, 2)

    monkeypatch.setattr(scheduling_lcm, "randn_tensor", same_noise)
    want, images = tiny_diffusers.draw(
        theirs, PROMPTS[:2], np.asarray(noise), **theirs_how, guidance_scale=1.0
    )
    full = {"solver": "lcm", "guidance": 1.0, "keys": keys, **how}
    found = pipe.denoise(*pipe.encode_text(PROMPTS[:2]), noise, steps=steps, **full)
    assert np.linalg.norm(found - want) / np.linalg.norm(want) < 1e-4
    values = [psnr(a, b) for a, b in zip(pipe(PROMPTS[:2], **how), images, strict=True)]
    assert min(values) >= 45


def test_bfloat16_draws_nearly_the_same(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    half = Pipeline.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    states, lengths = ours.encode_text(PROMPTS[:1])
    noise = noise_for(ours, 1, 64, 64)
    full, rough = (
        np.asarray(p.denoise(states, lengths, noise, steps=4, guidance=1.0)) for p in (ours, half)
    )
    assert rough.dtype == np.float32
    assert 0 < np.linalg.norm(full - rough) / np.linalg.norm(full) < 0.1
    assert half(PROMPTS[0], steps=2).dtype == np.uint8


def test_long_prompts_are_cut_with_a_warning_and_keep_the_end_mark(ours):
    with pytest.warns(UserWarning, match="cut to 120"):
        ids, lengths = tokenize(ours.tokenizer, ["red " * 200], 120)
    assert ids.shape == (1, 120) and lengths[0] == 120 and ids[0, -1] == ours.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"solver": "dpm+"}, "dpm\\+\\+"),
        ({"steps": 0}, "at least 1"),
        ({"height": 65}, "multiple of 16.*64 would do"),
        ({"width": -16}, "multiple of 16"),
        ({"times": "integers"}, "'integer'"),
        ({"null": "txt"}, "'text'"),
        ({"batch_size": 0}, "at least 1"),
        ({"guidance": float("nan")}, "finite"),
        ({"seed": -1}, "from 0"),
        ({"negative_prompt": ["a", "b"]}, "one for all"),
    ],
)
def test_options_that_cannot_be_used_are_named(ours, how, says):
    with pytest.raises(UserError, match=says):
        ours(PROMPTS[:1], **how)
    with pytest.raises(UserError, match="at least one"):
        ours([])


def test_folders_that_are_no_model_are_named(ours, tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    model = tmp_path / "model"
    ours.save_pretrained(model)
    with pytest.raises(UserError, match="part of a model"):
        Pipeline.from_pretrained(model / "transformer")
    scheduler, index = model / "scheduler" / "scheduler_config.json", model / "model_index.json"
    for path, change, says in (
        (scheduler, {"prediction_type": "flow_prediction"}, "prediction_type"),
        (scheduler, {"trained_betas": [0.1]}, "trained_betas"),
        (scheduler, None, "scheduler_config.json"),
        (
            index,
            {"_class_name": "PixArtBetaPipeline"},
            "unknown pipeline 'PixArtBetaPipeline' .did you mean",
        ),
        (index, None, "has no model_index.json"),
    ):
        before = path.read_text()
        path.unlink()
        if change is not None:
            path.write_text(json.dumps({**json.loads(before), **change}))
        with pytest.raises(UserError, match=says):
            Pipeline.from_pretrained(model)
        path.write_text(before)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        {"timestep_spacing": "trailing", "solver_order": 3},
        {"timestep_spacing": "leading", "steps_offset": 1},
    ],
    ids=lambda settings: next(iter(settings)) + str(len(settings)),
)
def test_what_the_scheduler_config_says_is_honoured_and_kept(tmp_path, settings):
    tiny_diffusers.build(tmp_path)
    file = Path("scheduler", "scheduler_config.json")
    (tmp_path / file).write_text(json.dumps({**read(tmp_path / file), **settings}))
    pipe = Pipeline.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path / "saved")
    assert read(tmp_path / "saved" / file).items() >= settings.items()
    assert_draws_the_same(opened(PixArtAlphaPipeline, tmp_path), pipe, PROMPTS)

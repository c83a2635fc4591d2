"""img2img, inpainting, outpainting, a style reference, variations and perturbed-attention guidance:
the same numbers as diffusers, and known pixels that stay as they are."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPAGPipeline

from pixart_jax import Pipeline, diffusion
from pixart_jax.errors import UserError
from pixart_jax.pipeline import SamplingConfig, editing, sampler
from tests import tiny_diffusers

PROMPTS = ["a large red circle", "a small blue star left of a large green square"]
RNG = np.random.default_rng(0)
LATENTS = RNG.normal(size=(2, 8, 8, 4)).astype(np.float32)
MASK = np.zeros((2, 8, 8, 1), np.float32)
MASK[:, 2:6, 3:] = 1
IMAGE = RNG.integers(0, 256, (64, 64, 3), np.uint8)
PIXELS = np.zeros((64, 64), bool)
PIXELS[10:40, 21:50] = True


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "size conditions"])
def pair(request, tmp_path_factory):
    """(diffusers' pipeline, ours)."""
    folder = tmp_path_factory.mktemp("tiny")
    theirs = tiny_diffusers.build(folder, size_conditions=request.param)
    return theirs, Pipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("ours")
    tiny_diffusers.build(folder)
    return Pipeline.from_pretrained(folder)


def to_torch(array) -> torch.Tensor:
    array = np.array(array, np.float32)
    return torch.from_numpy(array.transpose(0, 3, 1, 2) if array.ndim == 4 else array)


@torch.no_grad()
def by_diffusers(theirs, pipe, noise, latents, mask, steps, strength, guidance, reference=False):
    """The loops of diffusers' img2img and inpaint pipelines, over its PixArt transformer and its
    scheduler; ``reference``: the official reference pipeline's."""
    text, negative = (pipe.encode_text(t, 24) for t in (PROMPTS, [""] * 2))
    states = torch.cat([to_torch(negative[0]), to_torch(text[0])])
    lengths = np.concatenate([negative[1], text[1]])
    attention = torch.from_numpy(np.arange(states.shape[1]) < lengths[:, None])
    height, width = (8.0 * side for side in noise.shape[1:3])
    sized = theirs.transformer.config.use_additional_conditions
    added = {"resolution": None, "aspect_ratio": None}
    if sized:
        added = {
            "resolution": torch.tensor([[height, width]] * 4),
            "aspect_ratio": torch.tensor([[height / width]] * 4),
        }
    scheduler = type(theirs.scheduler).from_config(theirs.scheduler.config)
    scheduler.set_timesteps(steps)
    start = max(steps - min(int(steps * strength), steps), 0)
    times = scheduler.timesteps[start:]
    scheduler.set_begin_index(start)
    noise, known = to_torch(noise), to_torch(latents)
    first = times[:1].repeat(2)
    pure = mask is not None and strength == 1
    x = noise if pure else scheduler.add_noise(known, noise, first)
    free = x
    for i, t in enumerate(times):
        output = theirs.transformer(
            torch.cat([free if reference else x, x]),
            encoder_hidden_states=states,
            encoder_attention_mask=attention,
            timestep=t.expand(4),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        base, towards = output.chunk(2)
        prediction = (base + guidance * (towards - base)).chunk(2, dim=1)[0]
        free = x = scheduler.step(prediction, t, x, return_dict=False)[0]
        if mask is not None:
            kept = known
            if i < len(times) - 1:
                kept = scheduler.add_noise(known, noise, times[i + 1 : i + 2].repeat(2))
            x = (1 - to_torch(mask)) * kept + to_torch(mask) * x
    return x.permute(0, 2, 3, 1).numpy()


def relative(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def noise_for(pipe: Pipeline, height=64, width=64) -> np.ndarray:
    return np.asarray(pipe.noise(3, range(2), height, width)[0])


def denoised(pipe: Pipeline, noise, **options):
    text, negative = (pipe.encode_text(t) for t in (PROMPTS, [""] * 2))
    return pipe.denoise(*text, noise, *negative, times="integer", **options)


@pytest.mark.parametrize("mask", [None, MASK], ids=["img2img", "inpaint"])
@pytest.mark.parametrize(
    "pair, steps, strength",
    [(False, 20, 1.0), (False, 20, 0.75), (False, 50, 0.58), (True, 20, 0.75)],
    indirect=["pair"],
)
def test_gives_the_latents_of_diffusers(pair, mask, steps, strength):
    theirs, pipe = pair
    noise = noise_for(pipe)
    want = by_diffusers(theirs, pipe, noise, LATENTS, mask, steps, strength, 3.0)
    how = {"steps": steps, "strength": strength, "guidance": 3.0}
    got = denoised(pipe, noise, latents=LATENTS, mask=mask, **how)
    assert relative(got, want) < 1e-4
    if mask is not None:
        np.testing.assert_array_equal(np.where(MASK, 0, got), np.where(MASK, 0, LATENTS))


def test_a_reference_gives_the_latents_of_the_official_pipeline(pair):
    theirs, pipe = pair
    noise = np.concatenate([noise_for(pipe), LATENTS], axis=2)
    mask = np.repeat([0.0, 1.0], 8)[None, None, :, None] * np.ones((2, 8, 1, 1))
    known = np.concatenate([LATENTS, 0 * LATENTS], axis=2)
    want = by_diffusers(theirs, pipe, noise, known, mask, 8, 1.0, 3.0, reference=True)
    config = {"steps": 8, "guidance": 3.0, "latents": known, "mask": mask}
    plain = by_diffusers(theirs, pipe, noise, known, mask, 8, 1.0, 3.0)
    assert relative(denoised(pipe, noise, **config), plain) < 1e-4
    assert relative(denoised(pipe, noise, **config, reference=True), want) < 1e-4
    assert relative(plain, want) > 1e-3


@pytest.mark.parametrize("solver", diffusion.solvers.NAMES)
def test_known_latents_come_out_exactly_with_every_solver(ours, solver):
    """And a mask of all there is draws what no mask does: shown with one of each kind."""
    steps = {"lcm": 4, "dmd": 1}.get(solver, 6)
    text = ours.encode_text(PROMPTS)
    keys = ours.noise(3, range(2), 64, 64)[1]
    how = {"steps": steps, "solver": solver, "guidance": 1.0, "latents": LATENTS, "keys": keys}
    got = np.asarray(ours.denoise(*text, noise_for(ours), mask=MASK, **how))
    np.testing.assert_array_equal(got[MASK[..., 0] == 0], LATENTS[MASK[..., 0] == 0])
    if solver in ("dpm++", "sa"):
        everything = ours.denoise(*text, noise_for(ours), mask=np.ones_like(MASK), **how)
        plain = {name: value for name, value in how.items() if name != "latents"}
        np.testing.assert_array_equal(everything, ours.denoise(*text, noise_for(ours), **plain))


def test_runs_of_as_many_steps_left_share_one_program(ours):
    text = ours.encode_text(PROMPTS)
    how = {"guidance": 1.0, "latents": LATENTS, "mask": MASK}
    ours.denoise(*text, noise_for(ours), steps=20, strength=0.25, **how)
    before = sampler.sample_latents_jit._cache_size()
    for steps, strength in ((10, 0.5), (5, 1.0), (50, 0.1)):
        ours.denoise(*text, noise_for(ours), steps=steps, strength=strength, **how)
    assert sampler.sample_latents_jit._cache_size() == before


def test_pixels_outside_the_mask_stay_and_the_seam_lies_inside(ours):
    how = {"steps": 4, "image": IMAGE, "mask": PIXELS, "strength": 1.0}
    one, two = ours(PROMPTS, **how)
    for image in (one, two):
        np.testing.assert_array_equal(image[~PIXELS], IMAGE[~PIXELS])
        assert (image[PIXELS] != IMAGE[PIXELS]).mean() > 0.9
    assert (one != two).any()
    weight = editing.blend_weight(PIXELS)
    assert weight[~PIXELS].max() == 0 and weight[PIXELS].min() > 0 and weight.max() == 1
    several = {
        "image": np.stack([IMAGE] * 2),
        "mask": jnp.stack([255 * PIXELS.astype(np.uint8)] * 2),
    }
    np.testing.assert_array_equal(ours(PROMPTS, **how | several), [one, two])
    assert abs(ours(PROMPTS[1:], indices=[1], **how)[0].astype(int) - two).max() <= 1


def test_the_smaller_the_strength_the_nearer_to_the_image(ours):
    decoded = np.asarray(ours.decode(sampled := ours._edit([editing.Canvas(IMAGE)]).latents))[0]
    assert sampled.shape == (1, 8, 8, 4)
    how, twenty_left = {"guidance": 1.0, "image": IMAGE}, ((400, 0.05), (67, 0.3), (20, 1.0))
    far = [
        np.abs(ours(PROMPTS[:1], steps=n, strength=s, **how)[0].astype(float) - decoded).mean()
        for n, s in twenty_left
    ]
    assert far[0] < far[1] < far[2]


def test_the_box_of_a_mask_is_generated_at_full_size_and_put_back(ours):
    photo = RNG.integers(0, 256, (200, 320, 3), np.uint8)
    mask = np.zeros((200, 320))
    mask[150:171, 20:60] = 0.7
    how = {"height": 64, "width": 64, "mask_padding": 8, "steps": 3, "strength": 1.0}
    (image,) = ours(PROMPTS[:1], image=photo, mask=mask, **how)
    assert image.shape == photo.shape
    np.testing.assert_array_equal(image[mask < 0.5], photo[mask < 0.5])
    assert (image[mask > 0.5] != photo[mask > 0.5]).mean() > 0.9
    canvas = editing.canvas(photo, mask > 0.5, (64, 64), 8)
    top, left, bottom, right = canvas.box
    assert (bottom - top, right - left) == (56, 56)
    assert top <= 142 and bottom >= 179 and left <= 12 and right >= 68


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 64)])
@pytest.mark.parametrize("padding", [0, 5, 1000])
@pytest.mark.parametrize("corner", [(0, 0), (90, 140), (40, 70)])
def test_a_box_holds_its_mask_and_lies_inside_the_image(size, padding, corner):
    mask = np.zeros((100, 150), bool)
    mask[corner[0] : corner[0] + 10, corner[1] : corner[1] + 10] = True
    canvas = editing.canvas(np.zeros((100, 150, 3), np.uint8), mask, size, padding)
    top, left, bottom, right = canvas.box
    assert 0 <= top < bottom <= 100 and 0 <= left < right <= 150
    assert mask[top:bottom, left:right].sum() == 100
    assert canvas.image.shape == (*size, 3) and canvas.mask.any()


def test_an_image_is_edited_at_its_own_bucket(ours):
    sizes = {(64, 64): (64, 64), (100, 70): (96, 64), (300, 200): (96, 64), (20, 20): (16, 16)}
    for given, wanted in sizes.items():
        assert editing.default_size(given, ours.transformer.config, 8, SamplingConfig()) == wanted
    wide = RNG.integers(0, 256, (64, 96, 3), np.uint8)
    assert ours(PROMPTS[:1], image=wide, steps=2, strength=0.5).shape == (1, 64, 96, 3)


def test_outpainting_keeps_the_image_but_for_its_border():
    canvas, mask = editing.outpaint(IMAGE, 8, 0, 24, 40)
    assert canvas.shape == (104, 96, 3) and mask.shape == (104, 96)
    inside = slice(0, 64 - editing.OVERLAP), slice(8 + editing.OVERLAP, 72 - editing.OVERLAP)
    assert not mask[inside].any() and mask.sum() == mask.size - mask[inside].size
    np.testing.assert_array_equal(canvas[:64, 8:72], IMAGE)
    assert canvas[70:].std() < IMAGE.std()


def test_a_reference_gives_an_image_of_the_size_asked_for(ours):
    images = ours(PROMPTS, reference=IMAGE, steps=3)
    assert images.shape == (2, 64, 64, 3)
    other = ours(PROMPTS, reference=255 - IMAGE, steps=3)
    assert (images != other).any()


def test_a_variation_lies_between_the_images_of_two_seeds(ours):
    how = {"steps": 3, "guidance": 1.0}
    first, second = (ours(PROMPTS, seed=seed, **how) for seed in (1, 2))
    np.testing.assert_array_equal(ours(PROMPTS, seed=1, variation=(2, 0.0), **how), first)
    assert np.abs(ours(PROMPTS, seed=1, variation=(2, 1.0), **how).astype(int) - second).max() <= 1
    near = ours(PROMPTS, seed=1, variation=(2, 0.05), **how).astype(float)
    assert 0 < np.abs(near - first).mean() < np.abs(second.astype(float) - first).mean()


# ---- perturbed-attention guidance ----


@pytest.mark.parametrize(
    "layers, ours_layers, how",
    [
        ("blocks.1", (1,), {}),
        (["blocks.0.attn1", "blocks.1.attn1"], (0, 1), {"pag_adaptive_scale": 0.004}),
        ("blocks.0", (0,), {"guidance": 1.0}),
    ],
)
def test_pag_gives_the_latents_of_diffusers(tmp_path, layers, ours_layers, how):
    parts = tiny_diffusers.build(tmp_path).components
    theirs = PixArtSigmaPAGPipeline(**parts, pag_applied_layers=layers)
    theirs.set_progress_bar_config(disable=True)
    # it is given a time for each row, and asks whether that is positive: an error in diffusers
    scale = theirs._get_pag_scale
    theirs._get_pag_scale = lambda t: scale(t[0])
    pipe = Pipeline.from_pretrained(tmp_path)
    noise, guidance = noise_for(pipe), how.get("guidance", 3.0)
    options = {"pag_scale": 2.5, "pag_adaptive_scale": how.get("pag_adaptive_scale", 0.0)}
    want, _ = tiny_diffusers.draw(
        theirs, PROMPTS, noise, num_inference_steps=8, guidance_scale=guidance, **options
    )
    options |= {"steps": 8, "guidance": guidance}
    got = denoised(pipe, noise, pag_layers=ours_layers, **options)
    assert relative(got, want) < 1e-4
    assert relative(denoised(pipe, noise, steps=8, guidance=guidance), want) > 1e-3


def test_pag_perturbs_rows_of_a_model_with_size_conditions(pair):
    theirs, pipe = pair
    text = pipe.encode_text(PROMPTS)
    noise, params = noise_for(pipe), pipe.transformer.params
    program = jax.jit(pipe.transformer.module.apply, static_argnames="method")
    sizes = pipe._size_conditions(noise, None, None)

    def run(identity):
        apply = functools.partial(program, {"params": params})
        conditioning = apply(np.float32([500]), *sizes, method="encode_times")
        conditioning = jax.tree.map(lambda a: a[0], conditioning)
        kv = apply(*text, method="encode_text")
        return np.asarray(apply(noise, conditioning, kv, None, identity, method="denoise")[0])

    plain, both = run(None), run(np.ones((2, 2), bool))
    one = run(np.array([[True, False], [True, False]]))
    np.testing.assert_allclose(one[0], both[0], atol=1e-6)
    np.testing.assert_allclose(one[1], plain[1], atol=1e-6)
    assert np.abs(both - plain).max() > 1e-2


@pytest.mark.parametrize(
    "skips", [{"guidance_interval": (200, 700)}, {"blocks_every": 2}], ids=["interval", "blocks"]
)
def test_pag_goes_with_what_skips_work(ours, skips):
    noise = noise_for(ours)
    runs = [
        np.asarray(denoised(ours, noise, steps=6, guidance=3.0, pag_scale=p, **skips))
        for p in (0.0, 1e-4, 2.0)
    ]
    assert relative(runs[1], runs[0]) < 1e-3 < relative(runs[2], runs[0])


# ---- options that cannot be used ----

SMALL = np.zeros((32, 32), bool)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"mask": PIXELS}, "a mask needs the image"),
        ({"image": IMAGE, "mask": SMALL}, "bool [32, 32] for an image of 64 × 64"),
        ({"image": IMAGE, "mask": 0 * PIXELS}, "the mask selects nothing"),
        ({"image": IMAGE, "strength": 0.04}, "strength 0.04 leaves no step of 20: at least 0.05"),
        ({"image": IMAGE, "strength": 1.5}, "strength 1.5: a number above 0 and up to 1"),
        ({"image": IMAGE, "strength": float("nan")}, "strength nan"),
        ({"image": IMAGE.astype(float)}, "want uint8 [h, w, 3], got float64 [64, 64, 3]"),
        ({"image": [IMAGE] * 3}, "3 images for 2 prompts"),
        ({"image": IMAGE, "mask_padding": 8}, "mask padding needs a mask"),
        ({"image": IMAGE, "reference": IMAGE}, "exclude each other"),
        ({"pag_scale": 2.0, "pag_layers": (2,)}, "pag layers 2: numbers from 0 to 1"),
        ({"pag_scale": -1.0}, "pag_scale -1.0: a finite number of at least 0"),
        ({"pag_scale": 2.0, "cross_attention_steps": 5}, "exclude each other"),
        ({"variation": (5, 1.5)}, "variation 1.5"),
    ],
)
def test_options_that_cannot_be_used_are_named(ours, how, says):
    with pytest.raises(UserError) as error:
        ours(PROMPTS, **{"steps": 20} | how)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "how, says",
    [
        ({"mask": MASK}, "give latents"),
        ({"latents": LATENTS[:, :4]}, r"latents \[2, 4, 8, 4\] do not fit noise \[2, 8, 8, 4\]"),
        ({"latents": LATENTS, "mask": MASK[..., 0]}, r"mask \[2, 8, 8\] does not fit: want \[2"),
        ({"latents": LATENTS, "strength": 0.04}, "leaves no step of 20"),
    ],
)
def test_denoise_refuses_what_does_not_fit(ours, how, says):
    with pytest.raises(UserError, match=says):
        denoised(ours, noise_for(ours), **how)

"""Sampling under a ControlNet: what the scan gives is what the whole model gives at every step,
with every solver, beside edits; and what does not fit is one line."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixart_jax import Pipeline, cli, diffusion
from pixart_jax.commands import sample
from pixart_jax.diffusion import solvers
from pixart_jax.diffusion.guidance import control_scales
from pixart_jax.errors import UserError
from pixart_jax.images import canny, png_settings
from pixart_jax.models.configs import ControlNetConfig
from pixart_jax.models.controlnet import config_of
from pixart_jax.weights.component import ControlNet
from tests.models.reference import random_params

PROMPTS = ["a large red circle", "a small blue star left of a large green square"]
RNG = np.random.default_rng(0)
LATENTS, KNOWN = RNG.normal(size=(2, 2, 8, 8, 4)).astype(np.float32)
IMAGE = RNG.integers(0, 256, (64, 64, 3), np.uint8)
MASK = np.zeros((2, 8, 8, 1), np.float32)
MASK[:, 2:6, 3:] = 1
EDGES = np.where(RNG.random((64, 64)) < 0.1, 255, 0).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    """control, zero (one without any effect) and edges.png."""
    folder = tmp_path_factory.mktemp("control")
    config = config_of(Pipeline.from_pretrained(tiny_model).transformer.config)
    params = random_params(ControlNet, config, scale=0.15)
    ControlNet(config, params).save(folder / "control")
    nothing = jax.tree.map(np.zeros_like, params)
    units = {**params["units"], "after": nothing["units"]["after"]}
    ControlNet(config, {**nothing, "units": units}).save(folder / "zero")
    Image.fromarray(EDGES).save(folder / "edges.png")
    Image.fromarray(EDGES[:32]).save(folder / "wide.png")
    return folder


@pytest.fixture(scope="module")
def pipe(tiny_model, folder) -> Pipeline:
    return Pipeline.from_pretrained(tiny_model, controlnet=folder / "control")


def plain_path(pipe: Pipeline, noise, guidance, scales, **how):
    """The whole transformer under control at every step, for each half of guidance by itself."""
    states, lengths = pipe.encode_text(PROMPTS)
    empty, empty_lengths = pipe.encode_text([""] * len(PROMPTS), states.shape[1])
    times = jnp.asarray(diffusion.sampling.timesteps(how["solver"], how["steps"]), jnp.float32)

    def denoiser(x, t):
        scale = jnp.asarray(scales)[jnp.argmin(jnp.abs(times - t[0]))]
        given = {"controlnet": pipe.controlnet, "control": LATENTS, "control_scale": scale}
        toward = pipe.transformer.apply(x, t, states, lengths, **given)
        away = pipe.transformer.apply(x, t, empty, empty_lengths, **given)
        out = away[..., :4] + guidance * (toward - away)[..., :4]
        return jnp.concatenate([out, toward[..., 4:]], -1)

    return diffusion.sample(denoiser, noise, **how)


def check(pipe: Pipeline, solver: str) -> None:
    noise, keys = pipe.noise(5, range(2), 64, 64)
    how = {"steps": 3, "solver": solver}
    key = keys if solver in ("ddpm", "sa", "lcm", "euler_ancestral") else None
    control = {"control": LATENTS, "control_scale": 0.7, "control_end": 0.7}
    text = pipe.encode_text(PROMPTS)
    found = pipe.denoise(*text, noise, keys=key, guidance=2.0, **how, **control)
    scales = control_scales(np.arange(3), 0.7, 0.0, 0.7)
    want = plain_path(pipe, noise, 2.0, scales, key=key, **how)
    error = np.abs(found - want).max() / np.abs(want).max()
    print(f"{solver}: {error:.1e}")
    assert error <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("solver", [name for name in solvers.NAMES if name != "dmd"])
def test_every_solver_under_control_is_the_plain_path(pipe, solver):
    check(pipe, solver)


def test_a_pictures_edges_control_both_halves_of_guidance(pipe, tiny_model, folder):
    check(pipe, "dpm++")
    how = {"steps": 3, "seed": 4, "height": 64, "width": 64, "binning": False}
    plain = Pipeline.from_pretrained(tiny_model)
    images = pipe(PROMPTS, control=EDGES, **how)
    rgb = np.stack([EDGES] * 3, -1)
    np.testing.assert_array_equal(images, pipe(PROMPTS, control=[rgb, rgb], **how))
    assert np.abs(images.astype(int) - plain(PROMPTS, **how)).max() > 5
    np.testing.assert_array_equal(pipe(PROMPTS, **how), plain(PROMPTS, **how))
    # the encoded edges are the condition
    mean, _ = pipe.vae.encode(rgb[None] / 127.5 - 1.0)
    noise, _ = pipe.noise(4, range(2), 64, 64)
    latents = np.repeat(mean * pipe.vae.config.scaling_factor, 2, 0)
    text = pipe.encode_text(PROMPTS)
    decoded = pipe.decode(pipe.denoise(*text, noise, steps=3, control=latents))
    assert np.abs(images.astype(int) - decoded).max() <= 1


def test_no_effect_gives_the_plain_image_and_the_mask_keeps_what_is_known(tiny_model, folder, pipe):
    zero = Pipeline.from_pretrained(tiny_model, controlnet=folder / "zero")
    how = {"steps": 3, "seed": 4, "height": 64, "width": 64, "binning": False}
    plain = pipe(PROMPTS, **how).astype(int)
    for same in (
        zero(PROMPTS, control=EDGES, **how),
        pipe(PROMPTS, control=EDGES, control_scale=0.0, **how),
    ):
        # another program, which may round a pixel to the next level
        np.testing.assert_allclose(same.astype(int), plain, rtol=0, atol=1)
    noise, _ = pipe.noise(0, range(2), 64, 64)
    edit = {"latents": KNOWN, "mask": MASK, "strength": 0.7, "steps": 3}
    found = pipe.denoise(*pipe.encode_text(PROMPTS), noise, control=LATENTS, **edit)
    keeps = MASK[..., 0] == 0
    np.testing.assert_array_equal(np.asarray(found)[keeps], KNOWN[keeps])


@pytest.mark.slow
def test_windows_and_what_saves_work_go_with_control(tiny_model, folder, pipe):
    zero = Pipeline.from_pretrained(tiny_model, controlnet=folder / "zero")
    noise, _ = pipe.noise(0, range(2), 64, 64)
    # in windows, each with its part of the condition
    tiles = {"tile_window": 6, "tile_overlap": 2, "steps": 2}
    whole = pipe.denoise(*pipe.encode_text(PROMPTS), noise, control=LATENTS, **tiles)
    plain = pipe.denoise(*pipe.encode_text(PROMPTS), noise, **tiles)
    same = zero.denoise(*pipe.encode_text(PROMPTS), noise, control=LATENTS, **tiles)
    np.testing.assert_allclose(same, plain, rtol=1e-4, atol=1e-4)
    assert np.abs(whole - plain).max() > 0.1
    # with what saves work: parts of blocks kept, a third row of the batch, a change of segments
    more = {"blocks_every": 2, "pag_scale": 2.0, "guidance_interval": (0, 600), "steps": 4}
    found = pipe.denoise(*pipe.encode_text(PROMPTS), noise, control=LATENTS, **more)
    zeros = zero.denoise(*pipe.encode_text(PROMPTS), noise, control=LATENTS, **more)
    plain = pipe.denoise(*pipe.encode_text(PROMPTS), noise, **more)
    np.testing.assert_allclose(zeros, plain, rtol=1e-4, atol=1e-4)
    assert np.abs(found - plain).max() > 0.1


def test_start_and_end_are_shares_of_the_steps():
    whole = np.arange(10)
    assert control_scales(whole, 0.8, 0, 1).tolist() == [np.float32(0.8)] * 10
    assert control_scales(whole, 1, 0.3, 0.6).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    # the last steps of a run, as an edit has them
    assert control_scales(whole[6:], 1, 0.3, 0.8).tolist() == [1, 1, 0, 0]


def run(model: Path, out: Path, *flags) -> int:
    argv = ["--prompt", PROMPTS[0], "--model", model, "--out", out, "--steps", 2, *flags]
    return cli.run(sample.main, [str(flag) for flag in argv])


def test_the_command_line_controls_and_records_it(tiny_model, folder, tmp_path, pipe):
    edges, net = folder / "edges.png", folder / "control"
    flags = ["--controlnet", net, "--control", edges, "--control-scale", 0.5, "--control-end", 0.5]
    assert run(tiny_model, tmp_path / "out", *flags) == 0
    (path,) = (tmp_path / "out").glob("0*.png")
    settings = png_settings(path)
    assert settings["control"] == str(edges) and settings["controlnet"] == str(net)
    assert settings["control_scale"] == settings["control_end"] == 0.5
    assert len(settings["control_hash"]) == len(settings["controlnet_hash"]) == 10
    (want,) = pipe(PROMPTS[0], steps=2, control=EDGES, control_scale=0.5, control_end=0.5)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), want)
    stamp = path.stat().st_mtime_ns
    assert run(tiny_model, tmp_path / "out", *flags) == 0
    assert path.stat().st_mtime_ns == stamp


def test_control_from_draws_the_edges_of_a_picture(tiny_model, folder, tmp_path):
    """As a call with the map that `edges` writes of the same picture."""
    Image.fromarray(IMAGE).save(tmp_path / "photo.png")
    Image.fromarray(canny(IMAGE)).save(tmp_path / "map.png")
    flags = ["--controlnet", folder / "control", "--control"]
    photo, edges = [*flags, tmp_path / "photo.png"], [*flags, tmp_path / "map.png"]
    assert run(tiny_model, tmp_path / "a", *photo, "--control-from", "canny") == 0
    assert run(tiny_model, tmp_path / "b", *edges) == 0
    (a,), (b,) = ((tmp_path / name).glob("0*.png") for name in "ab")
    np.testing.assert_array_equal(Image.open(a), Image.open(b))
    assert png_settings(a)["control_from"] == "canny"


def test_what_does_not_fit_is_one_line(tiny_model, folder, tmp_path, pipe, capsys):
    config = ControlNetConfig(1, 48, 6)
    ControlNet(config, random_params(ControlNet, config)).save(tmp_path / "wide")
    config = config_of(pipe.transformer.config, units=2)
    ControlNet(config, random_params(ControlNet, config)).save(tmp_path / "deep")
    edges, net = folder / "edges.png", folder / "control"
    for flags, message in (
        (["--control", edges], "needs --controlnet"),
        (["--controlnet", net], "needs --control for every prompt"),
        (["--control", edges, "--controlnet", tmp_path / "no"], "no folder"),
        (["--control", tmp_path / "no.png", "--controlnet", net], "No such file"),
        (["--control", edges, "--controlnet", net, "--control-from", "hed"], "hed needs weights"),
        (["--control", edges, "--controlnet", tiny_model / "vae"], "a ControlNet is needed"),
        (["--control", edges, "--controlnet", tmp_path / "wide"], "does not fit a transformer"),
        (["--control", edges, "--controlnet", tmp_path / "deep"], "2 blocks does not fit"),
        (
            ["--control", folder / "wide.png", "--controlnet", net, "--height", 64, "--width", 64],
            "another aspect ratio",
        ),
        (
            ["--control", edges, "--controlnet", net, "--reference", edges],
            "control excludes reference",
        ),
        (["--control", edges, "--controlnet", net, "--control-start", 1], "control start 1, end 1"),
    ):
        assert run(tiny_model, tmp_path / "out", *flags) == 2, message
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    plain = Pipeline.from_pretrained(tiny_model)
    with pytest.raises(UserError, match="control needs a ControlNet"):
        plain(PROMPTS, control=EDGES, steps=2)
    with pytest.raises(UserError, match=r"latents \[2, 4, 8, 4\] do not fit noise"):
        noise, _ = pipe.noise(0, range(2), 64, 64)
        pipe.denoise(*pipe.encode_text(PROMPTS), noise, control=LATENTS[:, :4])
    with pytest.raises(UserError, match="control: want uint8"):
        pipe(PROMPTS, control=EDGES.astype(float))

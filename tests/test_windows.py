"""Large canvases in overlapping windows, seamless textures and --upscale."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pixart_jax import Pipeline, cli
from pixart_jax.commands import sample
from pixart_jax.commands.sample_edits import ROW_FIELDS, EditFlags
from pixart_jax.errors import UserError
from pixart_jax.files import bundled
from pixart_jax.images import png_settings
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.windows import Windows, over_windows, plan_windows

NO_ROW = dict.fromkeys(ROW_FIELDS)
PROMPTS = ["a large red star left of a small blue circle", "a yellow square"]


@pytest.fixture(scope="module")
def shapes():
    return Pipeline.from_pretrained(bundled("assets") / "shapes")


def field(window):
    """Depends on the neighbours and the place in the window."""
    return jnp.tanh(window + jnp.roll(window, 1, 1)) + jnp.arange(window.shape[2])[:, None]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (13, 9), (24, 17)])
def test_predictions_are_the_weighted_mean_of_the_windows(size, wrap):
    """Against a loop over the windows; odd canvases have no latent that is not covered."""
    side, overlap = 8, 3
    windows = Windows(side, overlap, wrap)
    x = np.random.default_rng(0).normal(size=(2, *size, 4)).astype(np.float32)
    got = jax.jit(lambda x: over_windows(lambda w, _: field(w), x, windows))(x)
    sums, total = np.zeros_like(x), np.zeros((*size, 1), np.float32)
    ramp = np.sin((np.arange(overlap) + 0.5) / overlap * np.pi / 2) ** 2
    starts = [windows.starts(length) for length in size]
    for top in starts[0]:
        for left in starts[1]:
            weights = []
            for start, own in ((top, starts[0]), (left, starts[1])):
                weight = np.ones(side, np.float32)
                if wrap or start != own[0]:
                    weight[:overlap] *= ramp
                if wrap or start != own[-1]:
                    weight[-overlap:] *= ramp[::-1]
                weights.append(weight)
            rows, columns = (top + np.arange(side)) % size[0], (left + np.arange(side)) % size[1]
            at = np.ix_(rows, columns)
            weight = (weights[0][:, None] * weights[1])[..., None]
            sums[:, at[0], at[1]] += np.asarray(field(x[:, at[0], at[1]])) * weight
            total[at] += weight
    assert total.min() > 0
    np.testing.assert_allclose(got, sums / total, rtol=0, atol=1e-5)
    if not wrap:
        assert all(own[0] == 0 and own[-1] + side == n for own, n in zip(starts, size))


def test_a_wrapped_canvas_has_no_origin():
    """Moved by a window's step, it gives the same moved."""
    x = np.random.default_rng(0).normal(size=(1, 16, 16, 4)).astype(np.float32)
    denoise = jax.jit(lambda x: over_windows(lambda w, _: field(w), x, Windows(8, 4, True)))
    moved = denoise(np.roll(x, (4, 8), (1, 2)))
    np.testing.assert_allclose(moved, np.roll(denoise(x), (4, 8), (1, 2)), atol=1e-5)


def test_one_window_equals_plain_sampling_to_the_bit(shapes):
    how = {"seed": 3, "steps": 2, "guidance": 1.0}
    plain = shapes(PROMPTS, **how)
    np.testing.assert_array_equal(shapes(PROMPTS, tile_window=8, tile_overlap=2, **how), plain)
    wide = shapes(PROMPTS, tile_window=8, tile_overlap=4, width=96, **how)
    assert wide.shape == (2, 64, 96, 3) and wide.std() > 5


def neighbours(images: np.ndarray, axis: int) -> tuple[float, float]:
    """(how much the last line differs from the first one, the most that two lines side by side
    do), in the mean of the images."""
    lines = np.moveaxis(images.astype(np.float64), axis, 0)
    inner = np.abs(np.diff(lines, axis=0)).mean((1, 2, 3))
    return np.abs(lines[0] - lines[-1]).mean(), inner.max()


def test_the_edges_of_a_seamless_texture_differ_no_more_than_its_neighbours(shapes):
    prompts = [*PROMPTS, "three green triangles", "a blue circle above a red square"]
    plain, seamless = (shapes(prompts, seamless=value, seed=3, steps=8) for value in (False, True))
    assert seamless.shape == plain.shape
    for axis in (1, 2):
        edge, inner = neighbours(seamless, axis)
        assert edge <= inner, f"axis {axis}: {edge:.2f} at the edge, {inner:.2f} inside"
    edge, inner = neighbours(plain, 1)
    assert edge > 1.2 * inner, (edge, inner)  # backgrounds are shaded from top to bottom


def test_upscale_refines_the_enlarged_image_in_windows(tmp_path):
    photo = np.full((48, 64, 3), (95, 105, 118), np.uint8)
    photo[12:36, 20:44] = (250, 220, 0)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    flags = ["--prompt", PROMPTS[1], "--image", tmp_path / "photo.png", "--upscale", 2]
    assert EditFlags(tmp_path / "photo.png", upscale=2).settings(NO_ROW)["strength"] == 0.3
    flags += ["--steps", 10, "--strength", 0.2, "--out", tmp_path / "out"]
    assert cli.run(sample.main, [str(flag) for flag in flags]) == 0
    (path,) = (tmp_path / "out").glob("0*.png")
    result, settings = np.asarray(Image.open(path)), png_settings(path)
    assert result.shape == (96, 128, 3)
    assert (settings["strength"], settings["tile_window"], settings["upscale"]) == (0.2, 8, 2.0)
    small = np.asarray(Image.fromarray(result).resize((64, 48), Image.Resampling.BOX), float)
    was, now = ((a[..., 1] > 130) & (a[..., 2] < 90) for a in (photo, small))
    assert (was & now).sum() > 0.7 * (was | now).sum()  # the square is where it was


@pytest.mark.parametrize(
    "options, says",
    [
        ({"tile_window": 10}, "tile window 10: the canvas has 8×12 latents; at most 8 fits"),
        ({"tile_window": 7}, "tile window 7: a multiple of 2"),
        ({"tile_window": 8, "tile_overlap": 6}, "tile overlap 6: 0 to 4, half a window"),
        ({"tile_overlap": 2}, "tile overlap needs --tile-window"),
        ({"tile_window": 8, "blocks_every": 2}, "exclude each other"),
        ({"seamless": True, "cross_attention_steps": 2}, "exclude each other"),
    ],
)
def test_windows_that_cannot_be_used_are_one_line(options, says):
    config = SamplingConfig(**options)
    with pytest.raises(UserError) as error:
        plan_windows(config, TransformerConfig(sample_size=8), (8, 12))
    assert says in str(error.value) and "\n" not in str(error.value)

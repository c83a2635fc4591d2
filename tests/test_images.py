"""PNG files carry their settings and appear whole; sheets hold every image."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage import color, data, feature

from pixart_jax.images import canny, image_grid, png_settings, slug, write_png

SETTINGS = {"prompt": "a star, red; naïve 日本", "negative_prompt": "blur", "steps": 20}
SETTINGS |= {"solver": "dpm++", "guidance": 4.5, "seed": 3, "height": 48, "width": 64}
SETTINGS |= {"model": "a, b", "model_hash": "0123456789", "index": 2}


def picture(height: int = 48, width: int = 64, value: int | None = None) -> np.ndarray:
    if value is not None:
        return np.full((height, width, 3), value, np.uint8)
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_settings_and_pixels_come_back(tmp_path):
    write_png(tmp_path / "a.png", picture(), SETTINGS)
    assert png_settings(tmp_path / "a.png") == SETTINGS
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture())


def test_parameters_read_as_the_web_interfaces_write_them(tmp_path):
    write_png(tmp_path / "a.png", picture(), SETTINGS)
    with Image.open(tmp_path / "a.png") as image:
        lines = image.info["parameters"].splitlines()
    sampled = "Steps: 20, Sampler: dpm++, CFG scale: 4.5, Seed: 3, Size: 64x48"
    of_model = 'Model hash: 0123456789, Model: "a, b", Index: 2'
    assert lines == [SETTINGS["prompt"], "Negative prompt: blur", f"{sampled}, {of_model}"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", picture(value=1), SETTINGS)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_png(tmp_path / "a.png", picture(value=2), SETTINGS)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with Image.open(tmp_path / "a.png") as image:
        assert np.asarray(image).max() == 1


def test_files_without_settings_or_cut_short_have_none(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "plain.png")
    write_png(tmp_path / "cut.png", picture(), SETTINGS)
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    for name in ("plain", "cut", "text", "absent"):
        assert png_settings(tmp_path / f"{name}.png") is None


def test_file_is_readable_as_any_other_new_file(tmp_path):
    write_png(tmp_path / "a.png", picture())
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("height, width", [(64, 64), (37, 53), (128, 97), (9, 5), (3, 3), (1, 7)])
def test_canny_equals_scikit_image(height, width):
    """On smooth, noisy and checked images; the last have gradients that are equal on either side of
    an edge."""
    rng = np.random.default_rng(height)
    smooth = ndimage.gaussian_filter(rng.uniform(0, 255, (height, width, 1)), (2, 2, 0))
    smooth = 255 * (smooth - smooth.min()) / np.ptp(smooth)
    checked = np.kron(rng.integers(0, 256, (33, 33, 1)), np.ones((4, 4, 1)))[:height, :width]
    marked = 0
    for grey in (smooth, picture(height, width)[..., :1], checked[..., :1]):
        image = np.repeat(grey.astype(np.uint8), 3, axis=-1)
        for sigma in (0.6, 1.0, 2.0):
            thresholds = {"low_threshold": 0.1, "high_threshold": 0.2}
            reference = feature.canny(image[..., 0] * (1 / 255), sigma=sigma, **thresholds)
            edges = canny(image, sigma)
            assert edges.dtype == np.uint8
            np.testing.assert_array_equal(edges, np.where(reference, 255, 0))
            marked += reference.sum()
    assert marked > 0 or min(height, width) < 5


def test_canny_takes_thresholds():
    image, count = data.camera()[100:301, 100:357], set()
    for low, high in ((0.05, 0.1), (0.1, 0.4), (0.3, 0.3)):
        edges = canny(np.stack([image] * 3, -1), low=low, high=high) > 0
        reference = feature.canny(image * (1 / 255), 1.0, low, high)
        np.testing.assert_array_equal(edges, reference)
        count.add(edges.sum())
    assert len(count) == 3 and not canny(np.full((8, 9, 3), 77, np.uint8)).any()


def test_canny_sees_colours_of_one_luma():
    """A square of another hue has its outline; luma alone has none."""
    image = np.full((32, 32, 3), (60, 110, 140), np.uint8)
    image[8:24, 8:24] = (140, 90, 102)
    assert not feature.canny(color.rgb2gray(image)).any()
    assert 50 < (canny(image) > 0).sum() < 80


def test_slug_is_short_words():
    assert slug("A large, red star!") == "a-large-red-star"
    assert len(slug("word " * 100)) <= 48
    assert slug("x" * 100) == "x" * 48
    assert slug("…") == slug("一只猫") == slug("🐈") == "empty"
    assert slug("Crème BRÛLÉE ﬁg: a/b\\c?*|<x>") == "creme-brulee-fig-a-b-c-x"
    assert slug("é" * 300) == "e" * 48
    assert "/" not in slug("../../etc/passwd")


def test_grid_holds_every_image_its_caption_and_its_mark():
    values = (10, 60, 110, 160, 200)
    captions = [f"caption number {v} of some length" for v in values]
    images = [picture(64, 64, v) for v in values]
    sheet = image_grid(images, captions, marks=[True, False, None, None, None])
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    for value in values:
        assert (sheet == value).all(-1).sum() > 120 * 120  # enlarged to 128 px, up to the frame
    assert (sheet == (20, 150, 50)).all(-1).any() and (sheet == (210, 30, 30)).all(-1).any()
    plain = image_grid(images)
    assert plain.shape[0] < sheet.shape[0]  # the captions take room


def test_grid_takes_images_of_several_sizes_and_long_words():
    images = [picture(64, 128, 9), picture(128, 64, 7)]
    sheet = image_grid(images, ["x" * 500, ""], columns=2, cell=64)
    assert (sheet == 9).all(-1).any() and (sheet == 7).all(-1).any()

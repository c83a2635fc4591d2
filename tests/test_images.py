"""PNG files carry their settings and appear whole; sheets hold every image."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from pixart_jax.images import image_grid, png_settings, slug, write_png

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

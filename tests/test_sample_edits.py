"""sample.py edits images: what its flags and a prompt file's columns say is what the pipeline does,
recorded in the PNG, and done once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart_jax import Pipeline, cli
from pixart_jax.commands import sample
from pixart_jax.images import png_settings
from pixart_jax.pipeline import editing

PROMPT = "a large red circle"
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (64, 64, 3), np.uint8)
MASK = np.zeros((64, 64), np.uint8)
MASK[8:40, 20:50] = 255


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(IMAGE).save(folder / "photo.png")
    Image.fromarray(255 - IMAGE[:48]).save(folder / "other.png")
    Image.fromarray(MASK).save(folder / "mask.png")
    (folder / "broken.png").write_bytes((folder / "photo.png").read_bytes()[:500])
    Image.fromarray(MASK[:32]).save(folder / "small.png")
    return folder


def run(model: Path, out: Path, *flags) -> int:
    argv = ["--model", model, "--out", out, "--steps", 4, *flags]
    return cli.run(sample.main, [str(flag) for flag in argv])


def only(folder: Path) -> tuple[np.ndarray, dict]:
    """(pixels, settings) of the one PNG in a folder."""
    (path,) = folder.glob("0*.png")
    with Image.open(path) as image:
        return np.asarray(image), png_settings(path)


@pytest.mark.parametrize(
    "flags, options",
    [
        ("--strength 0.5", {"strength": 0.5}),
        ("--mask mask.png --strength 1", {"mask": MASK, "strength": 1.0}),
        (
            "--mask mask.png --mask-padding 4 --height 32 --width 32",
            {"mask": MASK, "mask_padding": 4, "height": 32, "width": 32},
        ),
        ("--variation 7 0.25", {"variation": (7, 0.25)}),
    ],
)
def test_flags_do_what_the_pipeline_does(tiny_model, files, tmp_path, monkeypatch, flags, options):
    monkeypatch.chdir(files)
    flags = ["--prompt", PROMPT, "--image", "photo.png", *flags.split()]
    assert run(tiny_model, tmp_path, *flags) == 0
    got, settings = only(tmp_path)
    pipe = Pipeline.from_pretrained(tiny_model)
    (want,) = pipe(PROMPT, steps=4, image=IMAGE, **options)
    np.testing.assert_array_equal(got, want)
    assert settings["image"] == "photo.png" and settings["strength"] == options.get("strength", 0.6)
    (path,) = tmp_path.glob("0*.png")
    stamp = path.stat().st_mtime_ns
    assert run(tiny_model, tmp_path, *flags) == 0
    assert path.stat().st_mtime_ns == stamp and only(tmp_path)[1] == settings


def test_outpaint_and_reference(tiny_model, files, tmp_path):
    pipe = Pipeline.from_pretrained(tiny_model)
    photo = files / "photo.png"
    out = tmp_path / "outpaint"
    flags = ["--prompt", PROMPT, "--image", photo, "--outpaint", 16, 0, 16, 0, "--strength", 1]
    assert run(tiny_model, out, *flags) == 0
    canvas, mask = editing.outpaint(IMAGE, 16, 0, 16, 0)
    (want,) = pipe(PROMPT, steps=4, image=canvas, mask=mask, strength=1.0)
    np.testing.assert_array_equal(only(out)[0], want)
    assert only(out)[0].shape == (64, 96, 3)
    out = tmp_path / "reference"
    assert run(tiny_model, out, "--prompt", PROMPT, "--reference", photo) == 0
    np.testing.assert_array_equal(only(out)[0], pipe(PROMPT, steps=4, reference=IMAGE)[0])
    settings = only(out)[1]
    assert (settings["height"], settings["width"]) == (64, 64) and "strength" not in settings


def test_another_image_of_the_same_name_is_another_result(tiny_model, files, tmp_path):
    photo = tmp_path / "photo.png"
    for source in ("photo.png", "other.png"):
        shutil.copy(files / source, photo)
        assert run(tiny_model, tmp_path / "o", "--prompt", PROMPT, "--image", photo) == 0
    assert len(list((tmp_path / "o").glob("0*.png"))) == 2


def test_rows_of_a_prompt_file_name_images_masks_and_strengths(tiny_model, files, tmp_path):
    table = files / "p.csv"
    rows = [f"{PROMPT},,,", f"{PROMPT},photo.png,,", f"{PROMPT},other.png,,0.5"]
    rows += [f"{PROMPT},photo.png,mask.png,1", f"{PROMPT},photo.png,,0.5"]
    table.write_text("\n".join(["prompt,image,mask,strength", *rows]))
    assert run(tiny_model, tmp_path, "--prompts", table, "--batch-size", 2, "--no-grid") == 0
    pipe = Pipeline.from_pretrained(tiny_model)
    other = 255 - IMAGE[:48]
    wanted = [
        {},
        {"image": IMAGE},
        {"image": other, "strength": 0.5},
        {"image": IMAGE, "mask": MASK, "strength": 1.0},
        {"image": IMAGE, "strength": 0.5},
    ]
    for n, how in enumerate(wanted):
        (path,) = tmp_path.glob(f"{n:04d}_*.png")
        with Image.open(path) as image:
            got = np.asarray(image).astype(int)
        (want,) = pipe(PROMPT, steps=4, indices=[n], batch_size=2, **how)
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 1, n


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--image nope.png", "nope.png: No such file or directory"),
        ("--image broken.png", "broken.png: the image cannot be decoded"),
        ("--mask mask.png", "--mask needs --image"),
        ("--image photo.png --mask small.png", "for an image of 64 × 64"),
        ("--image photo.png --mask mask.png --outpaint 8 8 8 8", "outpaint makes a mask itself"),
        ("--image photo.png --outpaint 0 0 0 0", "not all 0"),
        ("--image photo.png --strength 0.1", "leaves no step of 4: at least 0.25 is needed"),
        ("--image photo.png --strength 2", "strength 2.0: a number above 0 and up to 1"),
        ("--image photo.png --reference photo.png", "exclude each other"),
        ("--variation 5 2", "variation 2.0: a share from 0 to 1"),
        ("--pag 2 --pag-layers 9", "pag layers 9: numbers from 0 to 1"),
    ],
)
def test_what_a_user_got_wrong_is_one_line(
    tiny_model, files, tmp_path, monkeypatch, capsys, flags, says
):
    monkeypatch.chdir(files)
    assert run(tiny_model, tmp_path / "out", "--prompt", PROMPT, *flags.split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert not (tmp_path / "out").exists()

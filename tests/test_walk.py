"""Walks between prompts: frames in order, key frames that are the prompts' own images, and
animations."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from PIL import Image

from pixart_jax import Pipeline, cli
from pixart_jax.commands import sample
from pixart_jax.errors import UserError
from pixart_jax.images import check_animation, png_settings, write_animation

PROMPTS = ["a large red circle", "a small blue star left of a large red circle", "a square"]


def run(model, out, *flags) -> int:
    argv = ["--model", model, "--out", out, "--steps", 2, "--batch-size", 4, *flags]
    return cli.run(sample.main, [str(flag) for flag in argv])


@pytest.fixture(scope="module")
def walked(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ("--prompts", folder / "prompts.txt", "--walk", 3, "--seed", 5)
    assert run(tiny_model, folder / "out", *flags) == 0
    return folder, flags


def test_key_frames_are_the_prompts_own_images_to_the_bit(tiny_model, walked, tmp_path):
    folder, flags = walked
    frames = sorted((folder / "out").glob("0*.png"))
    assert len(frames) == 2 * 3 + 1
    assert run(tiny_model, tmp_path, "--prompts", folder / "prompts.txt", "--seed", 5) == 0
    for path in sorted(tmp_path.glob("0*.png")):
        walking = folder / "out" / path.name
        assert png_settings(walking) == png_settings(path)
        assert np.array_equal(Image.open(walking), Image.open(path))


def test_the_frames_of_the_animation_go_from_key_to_key(tiny_model, walked, capsys):
    folder, flags = walked
    with Image.open(folder / "out" / "walk.webp") as movie:
        assert movie.n_frames == 7 and movie.size == (64, 64)
    paths = {p.name: p for p in (folder / "out").glob("0*.png")}
    names = [n for n in sorted(paths) if n.startswith("0000")]
    assert [png_settings(paths[n]).get("share") for n in names] == [None, 1 / 3, 2 / 3]

    stamps = {p: p.stat().st_mtime_ns for p in paths.values()}
    assert run(tiny_model, folder / "out", *flags, "--movie", "walk.gif") == 0
    assert "7 of them already there" in capsys.readouterr().out
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    with Image.open(folder / "out" / "walk.gif") as movie:
        assert movie.n_frames == 7


def test_the_way_begins_and_ends_at_the_two_images(tiny_model):
    pipe = Pipeline.from_pretrained(tiny_model)
    how = {"steps": 2, "seed": 1, "text_length": 16}
    own, other = pipe(PROMPTS[:2], **how)
    ways = [(PROMPTS[1], 1, 1, share) for share in (0.0, 0.01, 1.0)]
    start, near, end = (pipe(PROMPTS[:1] * 2, toward=[way] * 2, **how)[0] for way in ways)
    np.testing.assert_array_equal(start, own)
    assert np.abs(end.astype(int) - other).max() <= 1
    far = np.abs(other.astype(float) - own).mean()
    assert np.abs(near.astype(float) - own).mean() < 0.5 * far


def test_bad_walks_are_one_line(tiny_model, tmp_path, capsys):
    (tmp_path / "two.jsonl").write_text(
        '{"prompt": "a"}\n{"prompt": "b", "height": 32, "width": 32}'
    )
    flags = ("--prompts", tmp_path / "two.jsonl", "--walk", 3)
    for arguments, says in (
        ((*flags,), "a walk's prompts must be alike: height differs"),
        (("--prompt", "a", "--walk", 3), "a walk needs at least two prompts"),
        ((*flags, "--movie", "walk.avi"), "ends in .webp, .gif, .mp4"),
        (("--prompt", "a", "--walk", 0), "walk 0: at least 1"),
    ):
        assert run(tiny_model, tmp_path / "out", *arguments) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert says in line


def test_mp4_without_its_extra_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pixart-jax\[video\]"):
        check_animation("walk.mp4")


@pytest.mark.slow
def test_mp4_holds_the_frames(tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed (requirements-dev.txt)")
    frames = []
    for n in range(5):
        frames.append(tmp_path / f"{n}.png")
        Image.fromarray(np.full((33, 48, 3), 50 * n, np.uint8)).save(frames[-1])
    write_animation(tmp_path / "walk.mp4", frames, fps=10)
    with av.open(str(tmp_path / "walk.mp4")) as movie:
        found = [frame.to_ndarray(format="rgb24") for frame in movie.decode(video=0)]
    assert [frame.shape for frame in found] == [(32, 48, 3)] * 5
    assert all(abs(frame.mean() - 50 * n) < 5 for n, frame in enumerate(found))

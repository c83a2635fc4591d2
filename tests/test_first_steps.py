"""docs/first_steps.py trains and samples."""

from __future__ import annotations

import runpy
import sys

import pytest

from pixart_jax import images


@pytest.mark.slow
def test_first_steps_trains_and_writes_an_image(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    out = tmp_path / "image.png"
    flags = ["--steps", "2", "--batch", "4", "--scenes", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["first_steps.py", *flags])
    result = runpy.run_path("docs/first_steps.py")
    assert "step 1  loss" in capsys.readouterr().out
    assert result["generated"].shape == (4, 64, 64, 3) and 0 < result["loss"] < 10
    assert out.is_file() and images.png_settings(out) is None

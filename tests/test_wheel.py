"""The wheel holds the recipes and the shipped model, and works without the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile

import pytest

from pixart_jax.images import png_settings

PROMPT = "a large red star left of a small blue circle"


@pytest.fixture(scope="module")
def wheel(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    code = f"from hatchling import build; print(build.build_wheel({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def _links(page: str) -> set[str]:
    return {"dom.js"}.union(re.findall(r'(?:src|href)="([\w./]+)"', page))


def _works(command, folder, environment):
    """Sample with the shipped model, list the recipes: in a folder that holds neither."""
    run = {"cwd": folder, "env": environment, "text": True, "capture_output": True}
    done = subprocess.run([*command, "sample", "--prompt", PROMPT, "--steps", "4"], **run)
    assert done.returncode == 0, done.stderr
    (image,) = (folder / "out").glob("*.png")
    assert png_settings(image)["prompt"] == PROMPT
    listed = subprocess.run([*command, "train", "--help"], **run)
    assert "shapes_demo" in listed.stdout and "xl2_256_sam" in listed.stdout, listed.stderr


def test_the_wheel_samples_with_its_own_model(wheel, tmp_path):
    """Its files alone, with this environment's packages."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    package = tmp_path / "site" / "pixart_jax"
    assert (package / "py.typed").is_file()
    page = (package / "serving" / "static" / "index.html").read_text()
    assert all((package / "serving" / "static" / name).is_file() for name in _links(page))
    (tmp_path / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    _works([sys.executable, "-P", "-m", "pixart_jax"], tmp_path / "work", environment)


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    (tmp_path / "work").mkdir()
    subprocess.run([python, "-m", "pip", "install", "-q", wheel], check=True, cwd=tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    program = tmp_path / "env" / "bin" / "pixart-jax"
    _works([program], tmp_path / "work", environment)

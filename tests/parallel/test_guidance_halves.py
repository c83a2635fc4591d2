"""One prompt on two devices: each computes one half of guidance, and the image is that of one
device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pixart_jax import cli
from pixart_jax.commands import sample
from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.parallel.mesh import AXES
from pixart_jax.pipeline import Pipeline

PROMPT = "a large red star left of a small blue circle"


@pytest.mark.slow
def test_each_of_two_devices_computes_half_and_the_image_is_the_same(root):
    script, model = Path(__file__).with_name("guidance_on_two_devices.py"), root / "assets/shapes"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    how = {"capture_output": True, "text": True, "timeout": 900, "env": environment}
    done = subprocess.run([sys.executable, script, model, PROMPT], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["rows"] == 1, name  # one image, not one and its copy
        assert found["latents"] < 1e-5, (name, found)
        assert found["images"] <= 1, (name, found)
        assert 0.45 < found["work"] < 0.6, (name, found)


@pytest.mark.parametrize(
    ("images", "guided", "size"),
    [*((n, True, size) for n, size in enumerate((2, 2, 4, 4, 8), 1)), (1, False, 4), (4, False, 4)],
)
def test_a_batch_is_as_large_as_gives_every_device_rows_of_its_own(root, images, guided, size):
    pipe = Pipeline.from_pretrained(root / "assets" / "shapes", text_encoder=False)
    four = jax.sharding.AbstractMesh((2, 2, 1, 1), AXES)
    assert pipe.replace(mesh=four)._padded(images, guided) == size
    assert pipe._padded(images, guided) == images


def test_a_mesh_that_does_not_divide_the_heads_is_refused_where_the_pipeline_is_made(root):
    pipe = Pipeline.from_pretrained(root / "assets" / "shapes", text_encoder=False)
    sevenths = jax.sharding.AbstractMesh((1, 1, 1, 7), AXES)
    with pytest.raises(UserError, match="this transformer: mesh tensor 7 does not divide"):
        pipe.replace(mesh=sevenths)


def test_a_mesh_of_more_devices_than_there_are_is_one_line(capsys, tmp_path):
    flags = ["--prompt", PROMPT, "--out", str(tmp_path), "--mesh", "data=3,fsdp=5"]
    assert cli.run(sample.main, flags) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: mesh data 3 × fsdp 5") and printed.count("\n") == 1
    assert MeshConfig.parse("fsdp=2,context_attention=ring").context_attention == "ring"

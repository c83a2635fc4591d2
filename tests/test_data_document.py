"""docs/data.md's script runs as written: photographs → captions → nouns → shards → three stages →
pictures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SEEN_FROM_THERE = ("assets", "configs", "docs", "pixart_jax", "tests", "train.py", "sample.py")


@pytest.mark.slow
def test_the_script_in_the_document_takes_photographs_to_pictures(tmp_path):
    text = (ROOT / "docs" / "data.md").read_text()
    (script,) = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    for name in SEEN_FROM_THERE:
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home = {"PIXART_JAX_CACHE": str(tmp_path / "cache"), "PATH": path}
    home["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    how = {"cwd": tmp_path, "env": {**os.environ, **home}, "timeout": 2400}
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    data, runs = tmp_path / "data" / "photographs", tmp_path / "runs"

    looked = json.loads((data / "inspect" / "inspect.json").read_text())
    assert looked["readable"] == 240 == sum(looked["buckets"].values())
    assert looked["captions"]["dense"]["cut"] > 0
    captions = lines(data / "sam" / "captions" / "captions.jsonl")
    assert len({row["key"] for row in captions}) == 240
    assert len(list((data / "sam" / "captions").glob("*.txt"))) > 200
    assert "web" in (data / "nouns" / "nouns.json").read_text()
    assert (data / "nouns" / "side_by_side.png").exists()
    for shards in ("imagenet_64", "web_96"):
        assert json.loads((data / shards / "manifest.json").read_text())["samples"] == 240

    metrics = lines(runs / "photographs" / "metrics.jsonl")
    stages = [*dict.fromkeys(line["stage"] for line in metrics)]
    assert stages == ["256_imagenet", "256_sam", "1024_ms"]
    for stage in (stages[0], stages[2]):
        losses = [line["loss"] for line in metrics if line["stage"] == stage]
        assert np.mean(losses[-3:]) < losses[0], stage
    images = [np.asarray(Image.open(p)) for p in (runs / "photographs" / "drawn").glob("0*.png")]
    assert len(images) == 4
    assert all(image.shape == (96, 96, 3) and image.std() > 15 for image in images)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]

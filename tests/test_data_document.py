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
    (script,) = re.findall(
        r"^```sh\n(.*?)^```", (ROOT / "docs" / "data.md").read_text(), re.M | re.S
    )
    for name in SEEN_FROM_THERE:
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home = {
        "PIXART_JAX_CACHE": str(tmp_path / "cache"),
        "PATH": path,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=2400,
        env={**os.environ, **home},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    data, runs = tmp_path / "data" / "photographs", tmp_path / "runs"

    looked = json.loads((data / "inspect" / "inspect.json").read_text())
    assert (
        looked["readable"] == 240
        and sum(looked["buckets"].values()) == 240
        and looked["captions"]["dense"]["cut"] > 0
    )
    captions = [
        json.loads(line)
        for line in (data / "sam" / "captions" / "captions.jsonl").read_text().splitlines()
    ]
    assert (
        len({row["key"] for row in captions}) == 240
        and len(list((data / "sam" / "captions").glob("*.txt"))) > 200
    )
    nouns = json.loads((data / "nouns" / "nouns.json").read_text())
    assert "web" in json.dumps(nouns) and (data / "nouns" / "side_by_side.png").exists()
    for shards, count in (("imagenet_64", 240), ("web_96", 240)):
        assert json.loads((data / shards / "manifest.json").read_text())["samples"] == count

    lines = [
        json.loads(line)
        for line in (runs / "photographs" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [*dict.fromkeys(line["stage"] for line in lines)] == [
        "256_imagenet",
        "256_sam",
        "1024_ms",
    ]
    for stage in ("256_imagenet", "1024_ms"):
        losses = [line["loss"] for line in lines if line["stage"] == stage]
        assert np.mean(losses[-3:]) < losses[0], stage
    drawn = [
        np.asarray(Image.open(path)).astype(float)
        for path in sorted((runs / "photographs" / "drawn").glob("0*.png"))
    ]
    assert len(drawn) == 4 and all(
        picture.shape == (96, 96, 3) and picture.std() > 15 for picture in drawn
    )

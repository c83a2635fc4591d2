"""Random weights that both sides open, written once by diffusers under the cache folder.

    python -m benchmarks.speed.weights XL/2 plain multi-scale       (2.4 GB each)

The parameters lie in one file a model; each image size has a folder with its own config.json and a
link to that file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.cases import Case
from pixart_jax.files import cache_folder, write_json
from pixart_jax.weights.component import CONFIG, Transformer
from pixart_jax.weights.transformer import config_to_json

ROOT = Path(__file__).resolve().parents[2]


def folder_of(case: Case) -> Path:
    """A transformer's folder for the case, written where it is missing."""
    parameters = _parameters(case.model, case.multi_scale)
    if not parameters.is_dir():
        _start(case.model, "multi-scale" if case.multi_scale else "plain", check=True)
    sized = parameters.with_name(f"{parameters.name}-{case.px}")
    sized.mkdir(exist_ok=True)
    write_json(sized / CONFIG, config_to_json(case.config))
    link = sized / Transformer.weights_file
    if not link.is_symlink():
        link.symlink_to(Path(os.pardir) / parameters.name / Transformer.weights_file)
    return sized


def _parameters(model: str, multi_scale: bool) -> Path:
    name = f"{model.replace('/', '-')}{'-ms' if multi_scale else ''}"
    return cache_folder() / "benchmarks" / name


def _start(model: str, kind: str, check: bool = False):
    command = [sys.executable, "-m", "benchmarks.speed.weights", model, kind]
    if check:
        return subprocess.run(command, cwd=ROOT, check=True)
    return subprocess.Popen(command, cwd=ROOT)


def write(model: str, multi_scale: bool) -> None:
    """Write a model's parameters, unless they exist."""
    target = _parameters(model, multi_scale)
    if target.is_dir():
        return
    from diffusers import PixArtTransformer2DModel

    from benchmarks.parity_rows.weights import materialised

    target.parent.mkdir(parents=True, exist_ok=True)
    fields = config_to_json(Case("forward", model, 256, 1, "float32", multi_scale).config)
    made = materialised(lambda: PixArtTransformer2DModel.from_config(fields))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made.save_pretrained(Path(scratch) / "model", max_shard_size="1TB")
        os.rename(Path(scratch) / "model", target)


if __name__ == "__main__":
    model, *kinds = sys.argv[1:]
    if len(kinds) == 1:
        write(model, kinds == ["multi-scale"])
    else:  # a process each, at the same time
        started = [_start(model, kind) for kind in kinds]
        sys.exit(max(process.wait() for process in started))

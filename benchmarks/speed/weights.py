"""Random weights that both sides open: written once by diffusers' save_pretrained, under the cache
folder.

    python -m benchmarks.speed.weights XL/2 plain multi-scale       (what the benchmarks start by
    themselves; 2.4 GB each)

The numbers lie in one file a model; each image size has a folder with its own config.json and a
link to that file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.cases import Case
from pixart_jax.files import cache_folder
from pixart_jax.weights.component import CONFIG, Transformer
from pixart_jax.weights.files import write_json
from pixart_jax.weights.transformer import config_to_json

ROOT = Path(__file__).resolve().parents[2]


def _numbers(model: str, multi_scale: bool) -> Path:
    return (
        cache_folder() / "benchmarks" / f"{model.replace('/', '-')}{'-ms' if multi_scale else ''}"
    )


def folder_of(case: Case) -> Path:
    """A transformer's folder for the case, made where it is not there."""
    numbers = _numbers(case.model, case.multi_scale)
    if not numbers.is_dir():
        kind = "multi-scale" if case.multi_scale else "plain"
        subprocess.run(
            [sys.executable, "-m", "benchmarks.speed.weights", case.model, kind],
            cwd=ROOT,
            check=True,
        )
    sized = numbers.with_name(f"{numbers.name}-{case.px}")
    sized.mkdir(exist_ok=True)
    write_json(sized / CONFIG, config_to_json(case.config))
    link = sized / Transformer.weights_file
    if not link.is_symlink():
        link.symlink_to(Path(os.pardir) / numbers.name / Transformer.weights_file)
    return sized


def write(model: str, multi_scale: bool) -> None:
    """The numbers of a model, unless they are there."""
    target = _numbers(model, multi_scale)
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
    model, kinds = sys.argv[1], sys.argv[2:]
    if len(kinds) == 1:
        write(model, kinds == ["multi-scale"])
    else:  # each in a process of its own, at the same time
        made = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.speed.weights", model, kind], cwd=ROOT
            )
            for kind in kinds
        ]
        sys.exit(max(process.wait() for process in made))

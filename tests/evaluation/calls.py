"""What the tests of ``python -m pixart_jax evaluate`` share: how they call it, write its input and
read its output."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from pixart_jax import cli
from pixart_jax.evaluation import command
from pixart_jax.images import write_png


def evaluate(*argv) -> int:
    """The exit status."""
    return cli.run(command.main, [str(word) for word in argv])


def refused(capsys, *argv) -> str:
    """The line of error of a call, the only and last one on stderr, with exit status 2."""
    capsys.readouterr()
    assert evaluate(*argv) == 2
    lines = re.split("[\r\n]+", capsys.readouterr().err.rstrip("\n"))
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    return lines[-1]


def score_of(folder: Path) -> dict:
    return json.loads((folder / "score.json").read_text())


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_images(folder: Path, images, prompts=(), names=None, **settings) -> Path:
    """PNGs, with ``prompts`` as sample.py's, which record theirs and the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        path = folder / (names[n] if names else f"{n}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {"prompt": prompts[n], "index": n, "seed": n, **settings} if prompts else None
        write_png(path, image, own)
    return folder


def stub_sampler(monkeypatch, image) -> None:
    """Instead of sample.py's process: image(n, prompt) of row n of --prompts, kept if it exists."""

    def run(line):
        made, rows = (Path(line[line.index(flag) + 1]) for flag in ("--out", "--prompts"))
        for n, row in enumerate(rows_of(rows)):
            if not (path := made / f"{n}.png").exists():
                settings = {**row, "index": n, "seed": 0, "steps": 2}
                write_png(path, image(n, row["prompt"]), settings)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", run)

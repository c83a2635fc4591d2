"""The score of a metric, in one form for all: score.json for programs, a line for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from pixart_jax.files import write_json, write_text

_VERSIONS = ("pixart-jax", "jax", "flax", "numpy", "scipy", "pillow")


def line(name: str, value: float, interval: Sequence[float] | None = None) -> str:
    """A score for people."""
    between = "   95% {:.4f} – {:.4f}".format(*interval) if interval else ""
    return f"{name:24} {value:10.4f}{between}"


def finish(
    out: Path,
    metric: str,
    score: Mapping,
    n: Mapping[str, int | None],
    facts: Mapping,
    rows: Iterable[Mapping] | None = None,
    written: Iterable[Path] = (),
) -> None:
    """Write ``rows``, of an image each, as results.jsonl, then score.json; print their paths and
    those of files that are ``written`` already.

    score.json: metric, the score's value and 95% interval (None: not known), n images of each side,
    ``facts``, by which the figure can be made again (mode, hashes of weights, images and prompts,
    steps, solver, guidance, seeds …), and the versions of the libraries."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "score.json", *written]
    if rows is not None:
        files.append(out / "results.jsonl")
        write_text(files[-1], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    versions = {}
    for name in (*_VERSIONS, *(n for n in ("torch", "transformers") if n in sys.modules)):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a clone is not installed
            versions[name] = metadata.version(name)
    head = {"metric": metric, "value": score["value"], "interval": score.get("interval")}
    record = {**head, "n": n, **facts, "versions": versions}
    write_json(files[0], record, indent=1, ensure_ascii=False)
    print(f"\nwritten: {', '.join(map(str, files))}")

"""A score for programs, score.json, in one form for all metrics; and for people: a table, and a
sheet of images with right and wrong marked."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np

from pixart_jax.evaluation.shapes_score import Score, TaskScore
from pixart_jax.evaluation.tasks import ALL
from pixart_jax.files import write_json, write_text
from pixart_jax.images import image_grid

SHEET_COLUMNS = 8


SCORE = "score.json"
_VERSIONS = ("pixart-jax", "jax", "flax", "numpy", "scipy", "pillow")


def write_score(
    folder: Path, metric: str, score: Mapping, n: Mapping[str, int | None], facts: Mapping
) -> Path:
    """Write score.json: metric, the score's value and 95% interval (None: not known), n images of
    each side, then ``facts``, by which the figure can be made again (mode, hashes of weights,
    images and prompts, steps, solver, guidance, seeds …), and the versions of the libraries."""
    versions = {}
    for name in (*_VERSIONS, *(n for n in ("torch", "transformers") if n in sys.modules)):
        with contextlib.suppress(metadata.PackageNotFoundError):  # a clone is not installed
            versions[name] = metadata.version(name)
    head = {name: score.get(name) for name in ("value", "interval")}
    record = {"metric": metric, **head, "n": dict(n), **facts, "versions": versions}
    write_json(folder / SCORE, record, indent=1, ensure_ascii=False)
    return folder / SCORE


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
    """Write score.json, and the rows, of an image each, as results.jsonl; say where they lie, with
    what is ``written`` already."""
    out.mkdir(parents=True, exist_ok=True)
    files = list(written)
    if rows is not None:
        files.append(out / "results.jsonl")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(files[-1], "".join(lines))
    files.insert(0, write_score(out, metric, score, n, facts))
    print(f"\nwritten: {', '.join(map(str, files))}")


def table(score: Score, title: str) -> str:
    """Task, score, 95% interval, floor by shuffled captions, images; the withheld sets and the sums
    apart."""
    head = f"{'task':30} {'score':>6}   {'95% interval':^13}   {'floor':>5}   {'n':>5}"
    sums = {"mean of the six main tasks": score.mean}
    sums["all correct (not withheld)"] = score.all_correct
    parts = [[], [], [_row(name, task) for name, task in sums.items() if task is not None]]
    for name, task in score.tasks.items():
        parts[name.startswith("withheld")].append(_row(name, task))
    body = "\n\n".join("\n".join(part) for part in parts if part)
    return f"{title}\n\n{head}\n{'-' * len(head)}\n{body}"


def _row(name: str, task: TaskScore) -> str:
    floor = "    –" if task.floor is None else f"{task.floor:5.3f}"
    return f"{name:30} {task.score:6.3f}   {task.low:.3f} – {task.high:.3f}   {floor}   {task.n:5d}"


def sheet(
    score: Score, images: Sequence[np.ndarray], per_set: int = 2 * SHEET_COLUMNS
) -> np.ndarray:
    """The first images of each set, uint8 [H, W, 3], framed green where all is right, else red and
    with the tasks that failed."""
    shown: list[int] = []
    for name in dict.fromkeys(v.prompt.set for v in score.verdicts):
        shown += [i for i, v in enumerate(score.verdicts) if v.prompt.set == name][:per_set]
    verdicts = [score.verdicts[i] for i in shown]
    marks = [verdict.right[ALL] for verdict in verdicts]
    judged = ["RIGHT" if v.right[ALL] else f"WRONG ({', '.join(v.wrong)})" for v in verdicts]
    captions = [f"{how}: {v.prompt.caption}" for v, how in zip(verdicts, judged)]
    return image_grid([images[i] for i in shown], captions, marks=marks, columns=SHEET_COLUMNS)

"""A score for people: a table, and a sheet of images with right and wrong marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pixart_jax.evaluation.shapes_score import Score, TaskScore
from pixart_jax.evaluation.tasks import ALL
from pixart_jax.files import write_json
from pixart_jax.images import image_grid, write_png

SHEET_COLUMNS = 8


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


def write(
    folder: Path, score: Score, images: Sequence[np.ndarray], settings: Mapping
) -> list[Path]:
    """Write score.json (settings, tasks, single objects by attribute, every verdict) and sheet.png;
    return their paths."""
    record, picture = folder / "score.json", folder / "sheet.png"
    write_json(record, {**settings, **score.to_dict()}, indent=1, ensure_ascii=False)
    write_png(picture, sheet(score, images))
    return [record, picture]

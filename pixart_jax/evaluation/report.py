"""A score as a person reads it: a table, and a sheet of pictures with right and wrong marked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pixart_jax.evaluation.shapes_score import Score, TaskScore, by_attribute
from pixart_jax.evaluation.tasks import ALL
from pixart_jax.images import image_grid, write_png

SHEET_COLUMNS = 8


def table(score: Score, title: str) -> str:
    """Task, score, 95% interval, floor by shuffled captions, pictures; the withheld pairs and the
    sums apart."""
    lines = [
        title,
        "",
        f"{'task':30} {'score':>6}   {'95% interval':^13}   {'floor':>5}   {'n':>5}",
    ]
    lines.append("-" * len(lines[-1]))
    rows = list(score.tasks.items())
    for withheld in (False, True):
        part = [(task, share) for task, share in rows if task.startswith("withheld") == withheld]
        if part and withheld:
            lines.append("")
        lines += [_row(task, share) for task, share in part]
    sums = [
        ("mean of the six main tasks", score.mean),
        ("all correct (not withheld)", score.all_correct),
    ]
    lines += ["", *(_row(name, share) for name, share in sums if share is not None)]
    return "\n".join(lines)


def _row(name: str, share: TaskScore) -> str:
    floor = "    –" if share.floor is None else f"{share.floor:5.3f}"
    return (
        f"{name:30} {share.score:6.3f}   {share.low:.3f} – {share.high:.3f}   {floor}   "
        f"{share.n:5d}"
    )


def sheet(
    score: Score, images: Sequence[np.ndarray], per_set: int = 2 * SHEET_COLUMNS
) -> np.ndarray:
    """The first pictures of each set, uint8 [H, W, 3]: framed green where all is right, red where
    not, and what was wrong."""
    shown: list[int] = []
    for name in dict.fromkeys(v.asked.set for v in score.verdicts):
        shown += [i for i, v in enumerate(score.verdicts) if v.asked.set == name][:per_set]
    captions = []
    for i in shown:
        verdict = score.verdicts[i]
        fault = "RIGHT" if verdict.right[ALL] else f"WRONG ({', '.join(verdict.wrong)})"
        captions.append(f"{fault}: {verdict.asked.caption}")
    marks = [score.verdicts[i].right[ALL] for i in shown]
    return image_grid([images[i] for i in shown], captions, marks=marks, columns=SHEET_COLUMNS)


def write(
    folder: str | os.PathLike, score: Score, images: Sequence[np.ndarray], settings: Mapping
) -> list[Path]:
    """score.json (settings, tasks, single objects by attribute, every picture's verdict) and
    sheet.png; the paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {**settings, **score.to_dict()}
    record = {
        **{k: v for k, v in record.items() if k != "images"},
        "single": by_attribute(score),
        "images": record["images"],
    }
    path, partial = folder / "score.json", folder / ".score.json.part"
    partial.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    write_png(folder / "sheet.png", sheet(score, images))
    return [path, folder / "sheet.png"]

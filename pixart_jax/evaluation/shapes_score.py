"""Images and their prompts → a score: the share right in each task, its interval and its floor.

Intervals are Wilson's, 95%. The floor is what the same images score against other captions of their
set: what chance gives, with whatever habits the model has. A score counts as far as it lies above.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from pixart_jax.data import shapes
from pixart_jax.evaluation import checker
from pixart_jax.evaluation.checker import Detection
from pixart_jax.evaluation.tasks import ALL, MAIN, QUESTIONS, SETS, EvalPrompt, judge, unit
from pixart_jax.images import image_grid

_Z = 1.959964  # 95%
_COLUMNS = 8  # of a sheet of images
_SHUFFLES = 100  # other captions that an image is held against for the floor, at most


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """score: right / n, or a mean of such; low, high: its 95% interval; floor: the same under other
    captions, None where a set has one image; n images."""

    score: float
    low: float
    high: float
    floor: float | None
    n: int

    @classmethod
    def of(cls, verdicts: Sequence[Verdict], task: str, floor: float | None) -> TaskScore:
        right, n = sum(verdict.right[task] for verdict in verdicts), len(verdicts)
        return cls(right / n, *wilson(right, n), floor, n)

    def rounded(self) -> dict[str, float | int | None]:
        values = dataclasses.asdict(self)
        return {name: v if v is None else round(v, 4) for name, v in values.items()}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The detections in one image, and task → whether it is right."""

    prompt: EvalPrompt
    found: tuple[Detection, ...]
    right: dict[str, bool]

    @property
    def wrong(self) -> list[str]:
        """The tasks that failed; ['size or number'] where only the sum of all does not hold."""
        failed = [task for task, right in self.right.items() if not right and task != ALL]
        named = [task.rpartition(": ")[2] for task in failed]
        return named or ([] if self.right[ALL] else ["size or number"])

    def to_dict(self) -> dict:
        found = [
            {k: round(x, 3) if isinstance(x, float) else x for k, x in vars(f).items()}
            for f in self.found
        ]
        prompt = {"set": self.prompt.set, "prompt": self.prompt.caption}
        return {**prompt, "right": self.right, "found": found}


@dataclasses.dataclass(frozen=True)
class Score:
    """tasks: every task that has images; mean: of the six main ones, where all are there;
    all_correct: images of which everything is right, without the withheld sets."""

    tasks: dict[str, TaskScore]
    mean: TaskScore | None
    all_correct: TaskScore | None
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict:
        """For JSON: figures rounded to 4 digits, each image with its prompt and verdict."""
        sums = {"mean": self.mean, "all_correct": self.all_correct}
        return {
            "tasks": {name: task.rounded() for name, task in self.tasks.items()},
            **{name: task and task.rounded() for name, task in sums.items()},
            "single": self.by_attribute(),
            "images": [verdict.to_dict() for verdict in self.verdicts],
        }

    def by_attribute(self) -> dict[str, dict[str, float]]:
        """Of single objects: colour and shape → the share of their images that got it right."""
        found: dict[str, dict[str, float]] = {"colour": {}, "shape": {}}
        single = [v for v in self.verdicts if v.prompt.set == "single"]
        for kind, names in (("colour", shapes.COLOURS), ("shape", shapes.SHAPES)):
            for name in names:
                of = [v for v in single if getattr(v.prompt.scene.objects[0], kind) == name]
                if of:
                    found[kind][name] = round(float(np.mean([v.right[kind] for v in of])), 4)
        return found


def score(prompts: Sequence[EvalPrompt], images: Sequence[np.ndarray]) -> Score:
    """Judge images (uint8 [h, w, 3] each) by their prompts."""
    both = zip(prompts, images, strict=True)
    units = [unit(p.scene, min(image.shape[:2])) for p, image in both]
    found = [tuple(checker.find_objects(image)) for image in images]
    each = zip(prompts, found, units)
    verdicts = [Verdict(p, f, judge(p.set, p.scene, list(f), u)) for p, f, u in each]
    rows = {name: [i for i, p in enumerate(prompts) if p.set == name] for name in SETS}
    sets = {name: [verdicts[i] for i in rows[name]] for name in SETS if rows[name]}
    floors = {name: _floor(of, [units[i] for i in rows[name]]) for name, of in sets.items()}
    tasks = {
        task: TaskScore.of(sets[name], task, floors[name].get(task))
        for task, (name, _) in QUESTIONS.items()
        if name in sets
    }
    mean = _mean(tasks, sets) if all(task in tasks for task in MAIN) else None
    every, seen = None, [name for name in sets if not name.startswith("withheld")]
    if seen:
        known = [floors[name].get(ALL) for name in seen]
        floor = _average(known, [len(sets[name]) for name in seen])
        every = TaskScore.of(sum((sets[name] for name in seen), []), ALL, floor)
    return Score(tasks, mean, every, tuple(verdicts))


def wilson(right: float, n: float, z: float = _Z) -> tuple[float, float]:
    """The interval of a share, of z standard errors: 95% by default."""
    p, z2 = right / n, z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _average(values: Sequence[float | None], weights: Sequence[int] | None = None) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.average(known, weights=weights)) if len(known) == len(values) else None


def _floor(verdicts: list[Verdict], units: list[float]) -> dict[str, float]:
    """Task → the share right when each image is held against the scenes of others of its set; empty
    where there is one image.

    All others where there are few; else _SHUFFLES of them, the next in the order of captions and
    scenes, so that the order of the list does not matter.
    """
    count = len(verdicts)
    if count < 2:
        return {}
    prompts = [verdict.prompt for verdict in verdicts]
    order = sorted(range(count), key=lambda i: (prompts[i].caption, prompts[i].scene.to_json()))
    shifts = np.unique(np.linspace(1, count - 1, min(_SHUFFLES, count - 1)).astype(int))
    sums: Counter[str] = Counter()
    for shift in shifts:
        for place, i in enumerate(order):
            other = prompts[order[(place + shift) % count]]
            sums.update(judge(other.set, other.scene, list(verdicts[i].found), units[i]))
    return {task: total / (count * len(shifts)) for task, total in sums.items()}


def _mean(tasks: Mapping[str, TaskScore], sets: Mapping[str, Sequence]) -> TaskScore:
    """The mean of the main tasks. In its interval, distances from the score add up within a set,
    whose tasks are judged on the same images (so it is rather too wide), and in squares over sets,
    which are independent."""
    mean = float(np.mean([tasks[task].score for task in MAIN]))
    below: dict[str, float] = defaultdict(float)
    above: dict[str, float] = defaultdict(float)
    for task in MAIN:
        below[QUESTIONS[task][0]] += tasks[task].score - tasks[task].low
        above[QUESTIONS[task][0]] += tasks[task].high - tasks[task].score
    down, up = (math.hypot(*part.values()) / len(MAIN) for part in (below, above))
    floor = _average([tasks[task].floor for task in MAIN])
    n = sum(len(sets[name]) for name in below)
    return TaskScore(mean, max(0.0, mean - down), min(1.0, mean + up), floor, n)


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


def sheet(score: Score, images: Sequence[np.ndarray], per_set: int = 2 * _COLUMNS) -> np.ndarray:
    """The first images of each set, uint8 [H, W, 3], framed green where all is right, else red and
    with the tasks that failed."""
    shown: list[int] = []
    for name in dict.fromkeys(v.prompt.set for v in score.verdicts):
        shown += [i for i, v in enumerate(score.verdicts) if v.prompt.set == name][:per_set]
    verdicts = [score.verdicts[i] for i in shown]
    marks = [verdict.right[ALL] for verdict in verdicts]
    judged = ["RIGHT" if v.right[ALL] else f"WRONG ({', '.join(v.wrong)})" for v in verdicts]
    captions = [f"{how}: {v.prompt.caption}" for v, how in zip(verdicts, judged)]
    return image_grid([images[i] for i in shown], captions, marks=marks, columns=_COLUMNS)

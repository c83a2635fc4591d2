"""Pictures and what was asked of them → a score: the share right in each task, with its interval
and its floor.

Intervals are Wilson's, 95%. The floor is what the very same pictures score against other captions
of their set: what chance gives, with whatever habits the model has. A score means as much as it
stands above that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from pixart_jax.data import shapes
from pixart_jax.evaluation import checker
from pixart_jax.evaluation.checker import Detection
from pixart_jax.evaluation.tasks import ALL, MAIN, QUESTIONS, SETS, EvalPrompt, judge, unit

_Z = 1.959964  # 95%
_SHUFFLES = 100  # other captions that a picture is held against for the floor, at most


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """score: right / n, or a mean of such; low, high: its 95% interval; floor: the same under other
    captions, None where a set has one picture; n pictures."""

    score: float
    low: float
    high: float
    floor: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found in one picture, and task → whether it is right."""

    asked: EvalPrompt
    found: tuple[Detection, ...]
    right: dict[str, bool]

    @property
    def wrong(self) -> list[str]:
        """The tasks that went wrong; ['size'], say, where only the sum of all does not hold."""
        tasks = [
            task.rpartition(": ")[2]
            for task, right in self.right.items()
            if not right and task != ALL
        ]
        return tasks or ([] if self.right[ALL] else ["size or number"])


@dataclasses.dataclass(frozen=True)
class Score:
    """tasks: every task that had pictures; mean: of the six main ones, where all are there;
    all_correct: pictures of which everything is right, without the withheld sets."""

    tasks: dict[str, TaskScore]
    mean: TaskScore | None
    all_correct: TaskScore | None
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict:
        """For JSON: rounded to 4 digits, each picture with its prompt, what was found and what is
        right."""
        rounded = {
            name: {k: v if v is None else round(v, 4) for k, v in dataclasses.asdict(share).items()}
            for name, share in {**self.tasks, "mean": self.mean, ALL: self.all_correct}.items()
            if share is not None
        }
        mean, every = rounded.pop("mean", None), rounded.pop(ALL, None)
        images = [
            {
                "set": v.asked.set,
                "prompt": v.asked.caption,
                "right": v.right,
                "found": [
                    {
                        k: round(x, 3) if isinstance(x, float) else x
                        for k, x in dataclasses.asdict(f).items()
                    }
                    for f in v.found
                ],
            }
            for v in self.verdicts
        ]
        return {"tasks": rounded, "mean": mean, "all_correct": every, "images": images}


def score(asked: Sequence[EvalPrompt], images: Sequence[np.ndarray]) -> Score:
    """Judge images (uint8 [h, w, 3] each) by what was asked."""
    if len(asked) != len(images):
        raise ValueError(f"{len(images)} images for {len(asked)} scenes")
    units = [unit(a.scene, min(image.shape[:2])) for a, image in zip(asked, images)]
    found = [tuple(checker.find_objects(image)) for image in images]
    verdicts = [
        Verdict(a, f, judge(a.set, a.scene, list(f), u)) for a, f, u in zip(asked, found, units)
    ]

    tasks: dict[str, TaskScore] = {}
    right: dict[str, dict[str, np.ndarray]] = {}  # set → task → bool [n]
    floors: dict[str, dict[str, float | None]] = {}
    for name in SETS:
        rows = [i for i, a in enumerate(asked) if a.set == name]
        if not rows:
            continue
        right[name] = {
            task: np.array([verdicts[i].right[task] for i in rows])
            for task in verdicts[rows[0]].right
        }
        floors[name] = _floor(
            name, [asked[i] for i in rows], [found[i] for i in rows], [units[i] for i in rows]
        )
    for task, (name, _) in QUESTIONS.items():
        if name in right:
            tasks[task] = _share(right[name][task], floors[name][task])

    mean = every = None
    if all(QUESTIONS[task][0] in right for task in MAIN):
        low, high = _interval_of_mean(tasks, MAIN)
        mean = TaskScore(
            float(np.mean([tasks[task].score for task in MAIN])),
            low,
            high,
            _average([tasks[task].floor for task in MAIN]),
            sum(len(right[name][ALL]) for name in {QUESTIONS[task][0] for task in MAIN}),
        )
    seen = [name for name in right if not name.startswith("withheld")]
    if seen:
        pooled = np.concatenate([right[name][ALL] for name in seen])
        weights = [len(right[name][ALL]) for name in seen]
        every = _share(pooled, _average([floors[name][ALL] for name in seen], weights))
    return Score(tasks, mean, every, tuple(verdicts))


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = right / n, _Z**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def _average(values: Sequence[float | None], weights: Sequence[int] | None = None) -> float | None:
    return (
        None
        if any(value is None for value in values)
        else float(np.average(values, weights=weights))
    )


def _share(right: np.ndarray, floor: float | None) -> TaskScore:
    return TaskScore(float(right.mean()), *wilson(int(right.sum()), len(right)), floor, len(right))


def _floor(
    name: str, asked: list[EvalPrompt], found: list[tuple[Detection, ...]], units: list[float]
) -> dict[str, float | None]:
    """Task → the share right when picture i is held against the scenes of other pictures of its
    set.

    All others where there are few; else as many as _SHUFFLES, next in the order of captions and
    scenes, so that the order of the list does not count.
    """
    if len(asked) < 2:
        return dict.fromkeys([*(task for task, (of, _) in QUESTIONS.items() if of == name), ALL])
    order = sorted(range(len(asked)), key=lambda i: (asked[i].caption, asked[i].scene.to_json()))
    shifts = np.unique(np.linspace(1, len(order) - 1, min(_SHUFFLES, len(order) - 1)).astype(int))
    sums: dict[str, int] = {}
    for shift in shifts:
        for place, i in enumerate(order):
            other = asked[order[(place + shift) % len(order)]]
            for task, right in judge(name, other.scene, list(found[i]), units[i]).items():
                sums[task] = sums.get(task, 0) + right
    return {task: total / (len(order) * len(shifts)) for task, total in sums.items()}


def _interval_of_mean(tasks: dict[str, TaskScore], names: Sequence[str]) -> tuple[float, float]:
    """The 95% interval of the mean of tasks, from theirs: distances from the score add up within a
    set, whose tasks are answered by the same pictures (so this is on the careful side), and in
    squares over sets, which are independent."""
    mean, ends = float(np.mean([tasks[name].score for name in names])), []
    for end in ("low", "high"):
        apart: dict[str, float] = {}
        for name in names:
            of = QUESTIONS[name][0]
            apart[of] = apart.get(of, 0.0) + abs(getattr(tasks[name], end) - tasks[name].score)
        ends.append(math.hypot(*apart.values()) / len(names))
    return max(0.0, mean - ends[0]), min(1.0, mean + ends[1])


def by_attribute(score_: Score) -> dict[str, dict[str, float]]:
    """Of single objects: colour and shape → the share of pictures asked for it that got it
    right."""
    table: dict[str, dict[str, list[bool]]] = {"colour": {}, "shape": {}}
    for verdict in score_.verdicts:
        if verdict.asked.set == "single":
            wanted = verdict.asked.scene.objects[0]
            table["colour"].setdefault(wanted.colour, []).append(verdict.right["colour"])
            table["shape"].setdefault(wanted.shape, []).append(verdict.right["shape"])
    order = {"colour": shapes.COLOURS, "shape": shapes.SHAPES}
    return {
        kind: {k: round(float(np.mean(table[kind][k])), 4) for k in order[kind] if k in table[kind]}
        for kind in table
    }

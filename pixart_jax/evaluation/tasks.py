"""The tasks of the embedded world: sets of prompts, and the questions that judge an image of each.

The scenes of a set come from a seed apart from every split that a model trains or is tuned on, and
are the same for every model, so two scores of one level can be compared. ``withheld`` sets hold
only colour–shape pairs that never occur in training (shapes.WITHHELD).
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from tqdm import tqdm

from pixart_jax.data import shapes
from pixart_jax.errors import UserError, nearest
from pixart_jax.evaluation import checker
from pixart_jax.evaluation.checker import Detection

CAPTIONS = ("short", "dense")
SETS = {  # name: (task of shapes.draw_scene, withheld)
    "single": ("single", "never"),
    "count": ("count", "never"),
    "pair": ("pair", "never"),
    "three": ("three", "never"),
    "withheld single": ("single", "only"),
    "withheld pair": ("pair", "only"),
}


@dataclasses.dataclass(frozen=True)
class EvalPrompt:
    """One image to generate: a scene of a set, and its caption."""

    set: str
    scene: shapes.Scene
    caption: str


def eval_prompts(
    level: str, per_task: int, captions: str = "short", sets: tuple[str, ...] | None = None
) -> list[EvalPrompt]:
    """``per_task`` scenes of each set of the level (or of ``sets``), set after set.

    Scene i of a set does not depend on per_task. Raises UserError for an unknown level or kind of
    caption.
    """
    if level not in shapes.COLOURED:
        raise UserError(f"level {level!r} is unknown{nearest(level, shapes.COLOURED)}")
    if captions not in CAPTIONS:
        raise UserError(f"captions {captions!r}: 'short' or 'dense'")
    if per_task < 1:
        raise UserError(f"per-task {per_task}: ask for at least 1 picture a task")
    has = {task for task, _ in shapes.LEVELS[level].tasks}
    found = []
    for name, (task, withheld) in SETS.items():
        if task not in has or (sets is not None and name not in sets):
            continue
        for index in range(per_task):
            rng = np.random.default_rng([zlib.crc32(f"{level}/evaluate/{name}".encode()), index])
            scene = shapes.draw_scene(rng, level, task=task, withheld=withheld)
            while scene.style == "edges":  # some of the gallery: no colours to judge
                scene = shapes.draw_scene(rng, level, task=task, withheld=withheld)
            found.append(EvalPrompt(name, scene, shapes.captions(scene)[captions]))
    return found


# (positions in the rows that were asked for, their images, uint8 [h, w, 3] each) …
Batches = Iterable[tuple[Sequence[int], Iterable[np.ndarray]]]


def by_size(
    prompts: Sequence[EvalPrompt],
    make: Callable[[list[int], int, int], Batches],
    what: str | None = None,
) -> list[np.ndarray]:
    """Images in the order of the prompts, made by make(rows, height, width) size by size. what: of
    the progress bar; None: no bar."""
    images: dict[int, np.ndarray] = {}
    sizes: dict[tuple[int, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        sizes.setdefault((prompt.scene.height, prompt.scene.width), []).append(i)
    with tqdm(total=len(prompts), desc=what, unit="image", disable=what is None) as bar:
        for (height, width), rows in sizes.items():
            for positions, batch in make(rows, height, width):
                images.update(zip([rows[p] for p in positions], batch))
                bar.update(len(positions))
    return [images[i] for i in range(len(prompts))]


def unit(scene: shapes.Scene, shorter: int) -> float:
    """Pixels of radius for each of shapes.SIZES in an image of the scene whose shorter side has
    ``shorter`` px. Scenes of three and of the rich level are drawn at 0.8."""
    mean = np.mean([o.radius / shapes.SIZES[o.size] for o in scene.objects])
    nominal = mean * 64 / min(scene.height, scene.width)
    return shorter / 64 * (0.8 if nominal < 0.9 else 1.0)


# ---- the questions ----
# Each takes the scene of the prompt, the objects found (the largest first) and the pixels a unit of
# size, and answers yes or no.

Found = list[Detection]
Question = Callable[[shapes.Scene, Found, float], bool]


def _largest(*names: str) -> Question:
    """The largest object has these attributes of the prompt's."""

    def ask(scene: shapes.Scene, found: Found, unit: float) -> bool:
        wanted = scene.objects[0]
        return bool(found) and all(getattr(found[0], n) == getattr(wanted, n) for n in names)

    return ask


def _every(*names: str) -> Question:
    """Every object's attributes are there, whatever else is."""

    def ask(scene: shapes.Scene, found: Found, unit: float) -> bool:
        there = Counter(tuple(getattr(f, n) for n in names) for f in found)
        return Counter(tuple(getattr(o, n) for n in names) for o in scene.objects) <= there

    return ask


def _object(scene: shapes.Scene, found: Found, unit: float) -> bool:
    """There is one object, and it has the shape."""
    return len(found) == 1 and found[0].shape == scene.objects[0].shape


def _size(scene: shapes.Scene, found: Found, unit: float) -> bool:
    """The largest object has the size."""
    return bool(found) and found[0].size(unit) == scene.objects[0].size


def _counting(scene: shapes.Scene, found: Found, unit: float) -> bool:
    """There are as many objects as in the prompt, whatever they are."""
    return len(found) == len(scene.objects)


def _position(scene: shapes.Scene, found: Found, unit: float) -> bool:
    """The first object lies where the caption says, seen from the second.

    The two are the detections that agree best with them, in shape or in colour at least. A wrong
    shape counts in other tasks; an object that agrees in nothing is not there, and so not in its
    place.
    """

    def agreement(f: Detection, o: shapes.Object) -> float:
        # the noun weighs more than the adjective
        return 1.1 * (f.shape == o.shape) + (f.colour == o.colour)

    first, second = scene.objects[:2]
    best, answer = 0.0, False
    for a, b in itertools.permutations(found, 2):
        both = (agreement(a, first), agreement(b, second))
        if min(both) > 0 and sum(both) > best:
            best, answer = sum(both), checker.relation(a, b) == scene.relation
    return answer


def _all(scene: shapes.Scene, found: Found, unit: float) -> bool:
    """All that the short caption says but the texture: number, sizes, colours, shapes, relation."""
    wanted = Counter((o.size, o.colour, o.shape) for o in scene.objects)
    right = wanted == Counter((f.size(unit), f.colour, f.shape) for f in found)
    return right and (scene.relation is None or _position(scene, found, unit))


ALL = "all correct"
QUESTIONS: dict[str, tuple[str, Question]] = {  # task: (set whose images are judged, question)
    "object": ("single", _object),
    "colour": ("single", _largest("colour")),
    "shape": ("single", _largest("shape")),
    "size": ("single", _size),
    "counting": ("count", _counting),
    "both colours": ("pair", _every("colour")),
    "both shapes": ("pair", _every("shape")),
    "position": ("pair", _position),
    "binding": ("pair", _every("shape", "colour")),
    "three: position": ("three", _position),
    "three: binding": ("three", _every("shape", "colour")),
    "withheld: colour": ("withheld single", _largest("colour")),
    "withheld: shape": ("withheld single", _largest("shape")),
    "withheld: object and colour": ("withheld single", _largest("colour", "shape")),
    "withheld: position": ("withheld pair", _position),
    "withheld: binding": ("withheld pair", _every("shape", "colour")),
}
# the six whose mean is the score
MAIN = ("object", "colour", "shape", "counting", "position", "binding")


def judge(set: str, scene: shapes.Scene, found: Found, unit: float) -> dict[str, bool]:
    """Task → whether the image is right, of every task of a set and of ``ALL``."""
    questions = {task: ask for task, (name, ask) in QUESTIONS.items() if name == set} | {ALL: _all}
    return {task: ask(scene, found, unit) for task, ask in questions.items()}

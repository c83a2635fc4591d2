"""GenEval's rules (Ghosh et al. 2023, arXiv:2310.11513): does an image show what its prompt asks
for, by the objects that a detector found in it?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.evaluation.detections import Object, parsed

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = "red orange yellow green blue purple pink brown black white".split()
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of an object's score, to lie above
MOST = 16  # objects of a class
MARGIN = 0.1  # of two objects' sides together, by which an offset is shortened
_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_AXES = (("left of", "right of"), ("above", "below"))


def benchmark_name(name: str) -> str:
    """The benchmark's name of one of COCO's classes."""
    return _NAMES.get(name, name)


def place(line: int, number: int) -> str:
    """Where the image of a prompt lies, in the official layout."""
    return f"{line:05d}/samples/{number:04d}.png"


def image_name(path: str) -> str:
    """An image's path in the official layout. Raises ValueError for another."""
    if not (found := re.search(r"(?:^|/)(\d+)/samples/(\d+)\.png$", path)):
        raise ValueError(f"{path} is not as 00000/samples/0000.png")
    return place(int(found[1]), int(found[2]))


def read_metadata(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The lines of one file for all prompts, or of one file each. Raises UserError for a line of
    another form."""

    def parse(row: dict[str, Any]) -> dict[str, Any]:
        clauses = [*row["include"], *row.get("exclude", ())]
        known = all(isinstance(c["class"], str) and c["count"] > 0 for c in clauses)
        before = all(
            0 <= c["position"][1] < n for n, c in enumerate(row["include"]) if "position" in c
        )
        if not (known and before and isinstance(row["prompt"], str)) or row["tag"] not in TAGS:
            raise ValueError("a clause or tag is unknown")
        return row

    form = "a tag, a prompt and include [{class, count, …}]"
    lines = [row for path in paths for _, row in parsed(path, form, parse)]
    if not lines:
        raise UserError(f"{paths[0]} holds no prompts")
    return lines


def kept(metadata: Mapping[str, Any], found: Sequence[Object]) -> dict[str, list[Object]]:
    """Class → its objects above the threshold of the prompt's tag, the surest first, at most MOST.
    found: sorted by score."""
    least = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    classes: dict[str, list[Object]] = {}
    for one in found:
        if one.score > least:
            classes.setdefault(benchmark_name(one.name), []).append(one)
    return {name: objects[:MOST] for name, objects in classes.items()}


def relations(a: Object, b: Object) -> set[str]:
    """Where a lies from b: none, one or two of left of, right of, above, below."""
    boxes = np.array([a.box, b.box]).reshape(2, 2, 2)  # [object, corner, axis]
    offset = np.subtract(*boxes.mean(1))
    sides = np.abs(np.diff(boxes, axis=1)).sum((0, 1))
    beyond = np.maximum(np.abs(offset) - MARGIN * sides, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    shares = beyond / np.linalg.norm(offset)
    return {names[int(share > 0)] for names, share in zip(_AXES, shares) if abs(share) > 0.5}


def judge(metadata: Mapping[str, Any], found: Sequence[Object]) -> list[str]:
    """What is wrong with an image, in the words of its prompt's clauses; empty if it is correct.

    A clause of ``include`` is held against the ``count`` surest objects of its class: enough of
    them, of its colour, and each in its position from each object of the clause that it names. A
    clause of ``exclude`` is broken by ``count`` objects.
    """
    classes, wrong = kept(metadata, found), []
    groups: list[list[Object] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        group: list[Object] | None = classes.get(name, [])[:count]
        colours = [one.colour for one in group or ()]
        fault = ""
        if len(colours) < count:
            fault = f"{len(colours)} of {count} {name}"
        elif "color" in clause and colours.count(clause["color"]) < count:
            seen = ", ".join(str(colour) for colour in colours)
            fault = f"{name} is {seen}, not {clause['color']}"
        elif "position" in clause:
            where, index = clause["position"]
            target, pairs = groups[index], []
            if target is not None:
                pairs = [relations(one, other) for one in group or () for other in target]
            if target is None:
                fault = f"nothing for {name} to be {where}"
            elif missed := [pair for pair in pairs if where not in pair]:
                fault = f"{name} is {' and '.join(sorted(missed[0])) or 'nowhere'}, not {where}"
        groups.append(None if fault else group)
        wrong += [fault] * bool(fault)
    for clause in metadata.get("exclude", ()):
        if (n := len(classes.get(clause["class"], ()))) >= clause["count"]:
            wrong.append(f"{n} {clause['class']}, fewer than {clause['count']} asked")
    return wrong

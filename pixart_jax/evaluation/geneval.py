"""GenEval (Ghosh et al. 2023, arXiv:2310.11513): does an image show what its prompt asks for,
by the objects that a detector finds in it?"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.evaluation.benchmark import (
    BenchmarkOptions,
    BenchmarkRun,
    Object,
    Row,
    Source,
    objects_of,
    parsed,
    without_masks,
)
from pixart_jax.evaluation.torch_models import (
    Images,
    TorchModel,
    detect,
    embed_images,
    embed_texts,
    inside,
    unit,
)
from pixart_jax.files import write_json

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = "red orange yellow green blue purple pink brown black white".split()
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of an object's score, to lie above
MOST = 16  # objects of a class
GREY = 0x99  # of the pixels around an object whose colour is asked
MARGIN = 0.1  # of two objects' sides together, by which an offset is shortened
# of some of COCO's classes, the benchmark's names
_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
_AXES = (("left of", "right of"), ("above", "below"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenevalOptions(BenchmarkOptions):
    """Score GenEval: objects, numbers, colours and positions, by a detector with masks and CLIP."""

    metadata: Path | None = None
    """evaluation_metadata.jsonl; by default --benchmark's, or those beside the images"""
    per_prompt: int | None = None
    """images of each prompt, officially 4; by default as many as one has"""
    detections: Path | None = None
    """lines {image, objects}"""
    detector: str | None = None
    """instead of --detections: such as facebook/mask2former-swin-small-coco-instance"""
    clip: str | None = None
    """with --detector, for colours: such as openai/clip-vit-large-patch14"""


def evaluate_geneval(options: GenevalOptions, flags: Sequence[str] | None = None) -> None:
    """Look, score, print, write."""
    own = sorted((options.generated or Path("-")).glob("[0-9]*/metadata.jsonl"))
    if options.metadata or options.benchmark or not own:
        own = [options.metadata or options.find("prompts", "evaluation_metadata.jsonl")]
    elif int(own[-1].parent.name) != len(own) - 1:
        last = own[-1].parent.name
        raise UserError(f"{options.generated}: not {last} + 1 folders, from 00000 on")
    metadata = read_metadata(own)
    prompts = [line["prompt"] for line in metadata]
    run = BenchmarkRun(options, flags, prompts, place, image_name)
    if flags is not None and options.generated:
        for n, line in enumerate(metadata):
            write_json(options.generated / f"{n:05d}" / "metadata.jsonl", line, indent=None)

    def listed(found: Iterable[str]) -> list[str]:
        each = options.per_prompt or 1 + max(int(Path(name).stem) for name in found)
        return [place(i, j) for i in range(len(metadata)) for j in range(each)]

    def line_of(name: str) -> Row:
        return metadata[int(name.split("/")[0])]

    def look(nets, names, images):
        clauses = [line_of(name)["include"] for name in names]
        asked = [[clause["class"] for clause in some] for some in clauses]
        found = detect(nets["detector"], images, asked)
        for some, image, objects in zip(clauses, images, found):
            coloured = {clause["class"] for clause in some if "color" in clause}
            add_colours(nets["clip"], image, objects, coloured)
            yield [{"objects": without_masks(objects)}]

    source = Source(
        kind="detections",
        flags=("detector", "clip"),
        look=look,
        form="an image and objects, each with class, score and box",
        parse=lambda row: ("", objects_of(row)),
        judge=lambda image, found: judge(line_of(image), found[""]),
    )
    faults = run.judge(source, listed)
    if faults is None:
        return
    tasks: dict[str, dict[str, list[float]]] = {}
    results = []
    for image, wrong in faults.items():
        line, number = line_of(image), image.split("/")[0]
        tasks.setdefault(line["tag"], {}).setdefault(number, []).append(float(not wrong))
        head = {"image": image, "tag": line["tag"], "prompt": line["prompt"]}
        verdict = {"correct": not wrong, "reason": "\n".join(wrong)}
        results.append(head | verdict | {"metadata": json.dumps(line)})
    absent = [tag for tag in TAGS if tag not in tasks]
    run.finish(f"geneval ({run.by(source)})", tasks, results, absent=absent)


# ---- rules ----


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
        places = [(n, c["position"]) for n, c in enumerate(row["include"]) if "position" in c]
        before = all(0 <= index < n for n, (_, index) in places)
        if not (known and before and isinstance(row["prompt"], str)) or row["tag"] not in TAGS:
            raise ValueError("a clause or tag is unknown")
        return row

    form = "a tag, a prompt and include [{class, count, …}]"
    lines = [row for path in paths for _, row in parsed(path, form, parse)]
    if not lines:
        raise UserError(f"{paths[0]} holds no prompts")
    return lines


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
    found: sorted by score, of which at most MOST above the threshold count in each class.

    A clause of ``include`` is held against the ``count`` surest objects of its class: enough of
    them, of its colour, and each in its position from each object of the clause that it names. A
    clause of ``exclude`` is broken by ``count`` objects.
    """
    least = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    classes: dict[str, list[Object]] = {}
    for one in found:
        objects = classes.setdefault(_NAMES.get(one.name, one.name), [])
        objects += [one] * (one.score > least and len(objects) < MOST)
    wrong: list[str] = []
    groups: list[list[Object] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        group = classes.get(name, [])[:count]
        shown, fault = [one.colour for one in group], ""
        if len(group) < count:
            fault = f"{len(group)} of {count} {name}"
        elif "color" in clause and shown.count(clause["color"]) < count:
            fault = f"{name} is {', '.join(map(str, shown))}, not {clause['color']}"
        elif "position" in clause:
            where, index = clause["position"]
            if (targets := groups[index]) is None:
                fault = f"nothing for {name} to be {where}"
            else:
                pairs = [relations(one, other) for one in group for other in targets]
                if missed := [pair for pair in pairs if where not in pair]:
                    seen = " and ".join(sorted(missed[0])) or "nowhere"
                    fault = f"{name} is {seen}, not {where}"
        groups.append(None if fault else group)
        wrong += [fault] * bool(fault)
    for clause in metadata.get("exclude", ()):
        if (n := len(classes.get(clause["class"], ()))) >= clause["count"]:
            wrong.append(f"{n} {clause['class']}, fewer than {clause['count']} asked")
    return wrong


# ---- colours ----


def crop(image: np.ndarray, box: Sequence[float], mask: np.ndarray | None) -> np.ndarray:
    """An object cut out, uint8 [h, w, 3]; grey (#999) outside its mask."""
    h, w = image.shape[:2]
    shown = image if mask is None else np.where(mask[..., None], image, np.uint8(GREY))
    return shown[inside(box[1], box[3], h), inside(box[0], box[2], w)]


def colours(clip: TorchModel, crops: Images, name: str) -> list[str]:
    """The colour of objects of one class by zero-shot CLIP: the nearest of COLOURS."""
    nearest = (embed_images(clip, crops) @ _colour_texts(clip, name).T).argmax(-1)
    return [COLOURS[int(n)] for n in nearest]


@functools.lru_cache
def _colour_texts(clip: TorchModel, name: str) -> Any:
    """[colours, d]: the mean over three texts each."""
    forms = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    texts = [form.format(c, name) for c in COLOURS for form in forms]
    return unit(embed_texts(clip, texts).reshape(len(COLOURS), len(forms), -1).mean(1))


def add_colours(
    clip: TorchModel, image: np.ndarray, found: Sequence[dict], names: Iterable[str]
) -> None:
    """Set the colour of those detections of classes ``names`` that GenEval's rules may look at."""
    sure = [one for one in found if one["score"] > THRESHOLD]
    for name in sorted(names):
        some = [one for one in sure if _NAMES.get(one["class"], one["class"]) == name]
        crops = [crop(image, one["box"], one["mask"]) for one in some]
        for one, colour in zip(some, colours(clip, crops, name) if some else ()):
            one["color"] = colour

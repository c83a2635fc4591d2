"""T2I-CompBench++ (Huang et al. 2023 and 2025, arXiv:2307.06350): attributes by BLIP-VQA, places
and numbers by a detector, actions by CLIP. The rules are those of its code at commit 1b70949,
faults included: rules in words would give other numbers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from pixart_jax.errors import UserError
from pixart_jax.evaluation.benchmark import (
    BenchmarkOptions,
    BenchmarkRun,
    Object,
    Row,
    Source,
    objects_of,
    without_masks,
)
from pixart_jax.evaluation.phrases import TEXTBLOB, Phrasebook, Phrases
from pixart_jax.evaluation.torch_models import (
    add_depths,
    detect,
    embed_images,
    embed_texts,
    yes_and_no,
)
from pixart_jax.files import write_json

Category = Literal[
    "color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex"
]
NEEDS = {  # what a first step finds: the categories that are scored by it
    "answers": ("color", "shape", "texture", "complex"),
    "detections": ("spatial", "3d_spatial", "numeracy", "complex"),
    "similarities": ("non_spatial", "complex"),
}
PARSED = ("color", "shape", "texture", "spatial", "3d_spatial", "complex")  # by a parser's phrases
THRESHOLD = 0.1  # of a detection's score, to lie above
SHORT, LONG = 479, 480  # px of the sides at which boxes are compared
NEAR = 150.0  # px
OVERLAP, OVERLAP_3D, SAME = 0.1, 0.5, 0.9  # intersection over union

_RELATIONS = ["on side of", "next to", "near"]  # the first that a prompt holds is its relation
_RELATIONS += [f"on the {side} of" for side in ("left", "right", "bottom", "top")] + ["on top of"]
# the sign of (second − first) along (x, y); "on top of" has no rule and so scores 0
_AXES = {"on the right of": (0, -1), "on the left of": (0, 1)}
_AXES |= {"on the bottom of": (1, -1), "on the top of": (1, 1)}
_DEPTHS = {"in front of": 1, "behind": -1, "hidden": -1}  # sign of the first's depth − the second's
_BEFORE = ["on top of", "on bottom of", "on the left", "on the right", "next to", "on side of"]
_BEFORE += ["near"]  # between the two objects of a complex prompt
_PEOPLE = dict.fromkeys(("girl", "boy", "man", "woman"), "person")
_DETECTED = _PEOPLE | {"ship": "boat", "goldfish": "fish", "painting": "picture"}
_NUMBERS = "one two three four five six seven eight".split()
_COUNTS = {"a": 1, "an": 1} | {word: n for n, word in enumerate(_NUMBERS, 1)}
# what the benchmark counts; a noun of no other kind follows its numbers
_COUNTED = set(
    "airplane apple backpack bag balloon banana bear bee bicycle bird boat book bottle bowl boy "
    "bread butterfly cake camel camera candle car cat chair chicken clock computer couch cow cup "
    "deer desk dog drum duck egg fish flag frog giraffe girl goldfish guitar hamburger helicopter "
    "helmet horse key kite knife lamp lemon man microphone microwave mouse paddle painting peach "
    "pear pen person phone pig pillow plate printer rabbit refrigerator sheep ship shrimp sink "
    "sofa stool strawberry suitcase swan table television tent tomato toy train truck turtle vase "
    "woman".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompbenchOptions(BenchmarkOptions):
    """Score T2I-CompBench++: attributes by BLIP-VQA, places and numbers by a detector, actions by
    CLIP."""

    category: Category
    """of the prompts"""
    per_prompt: int = 10
    """images of each of --benchmark's prompts"""
    detections: Path | None = None
    """for spatial, 3d_spatial, numeracy, complex: lines {image, size, objects}"""
    answers: Path | None = None
    """for color, shape, texture, complex: lines {image, chunk, p_yes, p_no}"""
    similarities: Path | None = None
    """for non_spatial, complex: lines {image, cosine}"""
    detector: str | None = None
    """instead of --detections: a detector of transformers, folder or hub id"""
    depth: str | None = None
    """with --detector, for 3d_spatial: such as Intel/dpt-hybrid-midas"""
    vqa: str | None = None
    """instead of --answers: such as Salesforce/blip-vqa-capfilt-large"""
    clip: str | None = None
    """instead of --similarities: such as openai/clip-vit-base-patch32"""
    tagger: str = TEXTBLOB
    """finds the prompts' phrases: textblob, or name or folder of a spaCy model"""
    questions: Path | None = None
    """instead: the phrases that --save-questions wrote"""
    save_questions: Path | None = None
    """write the phrases of --benchmark's prompts, and stop"""


def evaluate_compbench(options: CompbenchOptions, flags: Sequence[str] | None = None) -> None:
    """Look, score, print, write; also the official vqa_result.json."""
    category, each = options.category, options.per_prompt
    table = options.questions
    book = Phrasebook.read(table) if table else Phrasebook.by(options.tagger)

    def prompts_of(name: str) -> list[str]:
        path = options.find("examples/dataset", f"{name}.txt")
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]

    prompts = prompts_of(f"{category}_val") if options.benchmark or options.save_questions else []
    if options.save_questions:
        digest = book.write(options.save_questions, prompts)
        return print(f"written: {options.save_questions}, by {book.name}, SHA-256 {digest}")
    listed = [f"{p}_{i * each + j:06d}.png" for i, p in enumerate(prompts) for j in range(each)]
    places = [f"samples/{name}" for name in listed]
    run = BenchmarkRun(options, flags, prompts, lambda i, j: places[i * each + j], image_name)
    scores: dict[str, dict[str, float]] = {}
    every = _answers(book), _detections(category, book), _similarities(category, book)
    sources = [source for source in every if category in NEEDS[source.kind]]
    for source in sources:  # every process computes its share of each
        found = run.judge(source, lambda names: listed or sorted(names, key=number_of))
        if found is not None:
            scores[source.kind] = found
    if len(scores) < len(sources):
        return None
    by = [run.by(source) for source in sources]
    images = list(next(iter(scores.values())))
    kinds = {image: tuple(scores) for image in images}
    if category == "complex":
        lists = [prompts_of(f"complex_val_{kind}") for kind in ("spatial", "action")]
        kinds = {image: kinds_of(prompt_of(image), *lists) for image in images}
    results = []
    by_prompt: dict[str, list[float]] = {}
    for image in images:
        score = sum(scores[kind][image] for kind in kinds[image]) / len(kinds[image])
        results.append({"image": image, "score": score})
        by_prompt.setdefault(prompt_of(image), []).append(score)
    # answers tell whose phrases they answer
    phrases = run.sources.get("answers", {"phrases": book.facts}).get("phrases")
    if phrases and category in PARSED:
        by.append(f"phrases={phrases['parser']}")
    run.finish(f"{category} ({', '.join(by)})", {category: by_prompt}, results, phrases=phrases)
    form = "{:.4f}" if "answers" in scores else "{}"
    answers = enumerate(form.format(row["score"]) for row in results)
    official = [{"question_id": n, "answer": answer} for n, answer in answers]
    write_json(run.options.out / "vqa_result.json", official, indent=None)


def _answers(book: Phrasebook) -> Source:
    def look(nets, names, images):
        chunks = [book[prompt_of(name)].chunks for name in names]
        found = yes_and_no(nets["vqa"], images, [[f"{c}?" for c in some] for some in chunks])
        for some, answers in zip(chunks, found):
            rows = zip(some, answers) if some else [("", (1.0, 0.0))]  # nothing to ask
            yield [{"chunk": chunk, "p_yes": yes, "p_no": no} for chunk, (yes, no) in rows]

    return Source(
        kind="answers",
        flags=("vqa",),
        look=look,
        form="an image, a chunk, p_yes and p_no",
        parse=lambda row: (row["chunk"], certainty(row["p_yes"], row["p_no"])),
        judge=lambda image, answers: attribute(answers.values()),
        also={"phrases": book.facts},
    )


def _detections(category: str, book: Phrasebook) -> Source:
    deep = category == "3d_spatial"

    def look(nets, names, images):
        prompts = [prompt_of(name) for name in names]
        words = [sought(category, prompt, book[prompt]) for prompt in prompts]
        found = detect(nets["detector"], images, words)
        if deep:
            add_depths(nets["depth"], images, found)
        for image, objects in zip(images, found):
            yield [{"size": list(image.shape[1::-1]), "objects": without_masks(objects)}]

    def parse(row: Row) -> tuple[str, list[Object]]:
        w, h = (float(side) for side in row["size"])
        objects = objects_of(row)
        if deep and any(one.depth is None for one in objects):
            raise ValueError("3d_spatial needs each object's depth")
        return "", scaled(objects, (w, h))

    def judge(image: str, found: dict) -> float:
        prompt = prompt_of(image)
        if category == "numeracy":
            return numeracy(prompt, found[""])
        if deep:
            return spatial_3d(prompt, book[prompt], found[""])
        return spatial(prompt, book[prompt], found[""], complex=category == "complex")

    return Source(
        kind="detections",
        flags=("detector", "depth") if deep else ("detector",),
        look=look,
        form="an image, its size [w, h] and objects, each with class, score and box",
        parse=parse,
        judge=judge,
        also={"phrases": book.facts},
    )


def _similarities(category: str, book: Phrasebook) -> Source:
    def look(nets, names, images):
        prompts = [prompt_of(name) for name in names]
        if category == "complex":
            prompts = [book[prompt].without_adjectives for prompt in prompts]
        seen = embed_images(nets["clip"], images)
        cosines = (seen * embed_texts(nets["clip"], prompts)).sum(-1)
        return [[{"cosine": cosine}] for cosine in cosines.tolist()]

    return Source(
        kind="similarities",
        flags=("clip",),
        look=look,
        form="an image and its cosine",
        parse=lambda row: ("", float(row["cosine"])),
        judge=lambda image, found: found[""],
        also={"phrases": book.facts} if category == "complex" else {},
    )


# ---- names of images, and which rules a prompt is scored by ----


def image_name(path: str) -> str:
    """The name of an image, ``<prompt>_000000.png``. Raises ValueError for another."""
    name = path.split("/")[-1]
    if not re.fullmatch(r"[^_]+_\d+\.\w+", name):
        raise ValueError(f"{path} is not named <prompt>_000000.png")
    return name


def prompt_of(image: str) -> str:
    return image.split("_")[0]


def number_of(image: str) -> tuple[int, str]:
    """By which images are sorted."""
    return int(image.split("_")[1].split(".")[0]), image


def sought(category: str, prompt: str, words: Phrases) -> list[str]:
    """The objects of a prompt, for detectors of words."""
    if category == "numeracy":
        return [_DETECTED.get(noun, noun) for noun, _ in numbers(prompt)]
    return _around(words) if category == "complex" else _ends(prompt, words)


def kinds_of(prompt: str, spatial: Iterable[str], action: Iterable[str]) -> tuple[str, ...]:
    """Of a complex prompt the kinds of NEEDS whose mean is its score. spatial, action: the prompts
    of these lists; all others have both."""

    def short(text: str) -> str:
        return text.split(".")[0].lower()

    if short(prompt) in map(short, spatial):
        return "answers", "detections"
    return ("answers", "similarities") if short(prompt) in map(short, action) else tuple(NEEDS)


def scaled(found: Iterable[Object], size: tuple[float, float]) -> list[Object]:
    """The objects above THRESHOLD, their boxes in an image of ``size`` (width, height) moved to
    the benchmark's size: short side SHORT, long side at most LONG."""
    short, long = SHORT, int(SHORT * max(size) / min(size))
    if long > LONG:
        short, long = int(LONG * short / long), LONG
    new = (short, long) if size[0] <= size[1] else (long, short)
    fx, fy = (after / before for after, before in zip(new, size))
    return [
        dataclasses.replace(one, box=(x0 * fx, y0 * fy, x1 * fx, y1 * fy))
        for one in found
        for x0, y0, x1, y1 in (one.box,)
        if one.score > THRESHOLD
    ]


# ---- attributes ----


def certainty(p_yes: float, p_no: float) -> float:
    """P(yes) against no, rounded as the original writes it. Raises ValueError for numbers that are
    no probabilities."""
    if not (0 <= float(p_yes) <= 1 and 0 <= float(p_no) <= 1 and p_yes + p_no > 0):
        raise ValueError(f"p_yes {p_yes}, p_no {p_no}")
    return round(p_yes / (p_yes + p_no), 4)


def attribute(certainties: Iterable[float]) -> float:
    """The product over noun phrases."""
    return round(math.prod(certainties), 4)


# ---- two objects ----


def spatial(prompt: str, words: Phrases, found: Sequence[Object], complex: bool = False) -> float:
    """2-D relation, 0 or 0.5 … 1. found: scaled, the surest first. complex: the objects are those
    around the preposition, not the first and the last noun."""
    names = _around(words) if complex else _ends(prompt, words)
    relation = next((name for name in _RELATIONS if name in prompt), "")
    places = [next((o for o in found if o.name == name), None) for name in names]
    score = _blend(places, lambda a, b: _beside(relation, a, b))
    return score if score >= 0.5 else 0.0


def spatial_3d(prompt: str, words: Phrases, found: Sequence[Object]) -> float:
    """3-D relation, 0 … 1; an object's label need only hold the noun. Of several boxes of one
    noun the last counts that comes before both are found."""
    names = _ends(prompt, words)
    sign = next((sign for name, sign in _DEPTHS.items() if name in prompt), 0)
    places: list[Object | None] = [None, None]
    both = all(any(name in o.name for o in found) for name in names)
    for one in found:
        for n, name in enumerate(names):
            if name in one.name and (both or places[n] is None):
                places[n] = one
        if all(places):
            break
    return _blend(places, lambda a, b: _before(sign, a, b))


def _blend(places: Iterable[Object | None], position: Callable[[Object, Object], float]) -> float:
    """A quarter of each object's score, half of the position of both."""
    seen = [one for one in places if one is not None]
    score = sum(0.25 * one.score for one in seen)
    return score + position(*seen) / 2 if len(seen) == 2 else score


def _ends(prompt: str, words: Phrases) -> list[str]:
    if not words.nouns:
        raise UserError(f"{prompt!r} has no noun, by this parser: give a table, --questions FILE")
    return [_PEOPLE.get(noun, noun) for noun in (words.nouns[0], words.nouns[-1])]


def _around(words: Phrases) -> list[str]:
    """The nearest nouns before and after each preposition, where there are two; else none."""
    texts, kinds = zip(*words.words)
    found = []
    for i in range(len(texts)):
        length = next((k for k in (3, 2, 1) if " ".join(texts[i : i + k]) in _BEFORE), 0)
        if not length:
            continue
        found += [texts[j] for j in range(i - 1, -1, -1) if kinds[j] in ("NOUN", "PROPN")][:1]
        after = range(i + length, len(texts))
        common = [texts[j] for j in after if kinds[j] == "NOUN"]
        proper = [texts[j] for j in after[:-1] if kinds[j] == "PROPN" != kinds[j + 1]]
        found += (common or proper)[:1]
    return [_PEOPLE.get(noun, noun) for noun in found] if len(found) == 2 else []


def _beside(relation: str, a: Object, b: Object) -> float:
    offset = [(b.box[n] + b.box[n + 2] - a.box[n] - a.box[n + 2]) / 2 for n in (0, 1)]
    if relation in _RELATIONS[:3]:
        near = min(map(abs, offset)) < NEAR
        return 1.0 if near else NEAR / max(map(abs, offset))
    if relation not in _AXES:
        return 0.0
    axis, sign = _AXES[relation]
    if offset[axis] * sign <= 0 or abs(offset[axis]) <= abs(offset[1 - axis]):
        return 0.0
    overlap = _overlap(a.box, b.box)[0]
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def _before(sign: int, a: Object, b: Object) -> float:
    """Nothing at an overlap of 0 or of exactly OVERLAP_3D."""
    overlap = _overlap(a.box, b.box)[0]
    nearer = ((a.depth or 0.0) - (b.depth or 0.0)) * sign > 0
    return min(overlap / OVERLAP_3D, 1.0) if nearer and overlap != OVERLAP_3D else 0.0


def _overlap(a: Sequence[float], b: Sequence[float], rim: int = 0) -> tuple[float, float, float]:
    """Intersection over union, over a, over b. rim: 1 where a box holds its last pixel."""
    w, h = (min(a[n + 2], b[n + 2]) - max(a[n], b[n]) + rim for n in (0, 1))
    areas = [(box[2] - box[0] + rim) * (box[3] - box[1] + rim) for box in (a, b)]
    shared = max(0.0, w) * max(0.0, h)
    wholes = (sum(areas) - shared, *areas)
    return tuple(shared / whole if whole else 0.0 for whole in wholes)  # type: ignore[return-value]


# ---- numbers ----


def numeracy(prompt: str, found: Sequence[Object]) -> float:
    """Half for each kind of object that is there, half for its exact number. found: scaled."""
    asked = numbers(prompt)
    kept: list[Object] = []
    if not asked:
        raise UserError(f"{prompt!r} asks for no number of objects")
    for one in found:  # boxes of one label that nearly coincide or lie in each other are one
        same = (o for o in kept if o.name == one.name)
        if not any(max(_overlap(one.box, o.box, rim=1)) > SAME for o in same):
            kept.append(one)
    labels = [one.name for one in kept]
    score = 0.0
    for noun, count in asked:
        name = _DETECTED.get(noun, noun)
        if name not in labels:  # a label that holds the noun stands for it, from now on
            labels = [name if name in label else label for label in labels]
        score += 0.5 * (name in labels) + 0.5 * (labels.count(name) == count)
    return score / len(asked)


def numbers(prompt: str) -> list[tuple[str, int]]:
    """(noun, singular, how many) for each number in a prompt; of nouns that the benchmark counts,
    or of any where it has none of them."""
    from textblob.en.inflect import singularize

    words = re.findall(r"\w+|[^\w\s]", prompt)
    pairs = [(after, _COUNTS[word]) for word, after in zip(words, words[1:]) if word in _COUNTS]
    asked = [(noun, singularize(noun), count) for noun, count in pairs]
    counted = [(one, count) for _, one, count in asked if one in _COUNTED]
    return counted or [(noun if count == 1 else one, count) for noun, one, count in asked]

"""A blind user study: trials of two images on a static page, and the votes of its raters.

:func:`build` writes two parts. OUT/page holds all that a rater may see: images under names that say
nothing, without metadata, and the trials. OUT/key.json says which model an image is of.

A rater judges one sheet: for each question a pass over the same pairs of images, repeats of some
with the sides exchanged, and, where the question has a right answer, gold trials, in which one
image belongs to another prompt. The sides and the order of trials are a hash of rater and trial, so
a page that is loaded again shows the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from pixart_jax.errors import Notice, UserError
from pixart_jax.evaluation.features import ImageSet
from pixart_jax.files import write_json, write_text
from pixart_jax.images import write_png
from pixart_jax.pipeline.output import AsyncWriter
from pixart_jax.text import read_prompts

Question = Literal["quality", "alignment"]
QUESTIONS: dict[str, tuple[str, bool]] = {  # name: (text, whether the prompt is shown)
    "quality": ("Which image looks better?", False),
    "alignment": ("Which image fits the text better?", True),
}
ANSWERS = ("left", "right", "tie", "both_bad")
PAGE, KEY = "page", "key.json"
EXTRA = 0.05  # repeats, and gold trials, for each trial of a sheet
STATIC = Path(__file__).with_name("study_page")  # index.html, study.js, study.css
_NUMBERED = re.compile(r"(.+)_\d{6}")  # T2I-CompBench's names: PROMPT_000000.png


@dataclasses.dataclass(frozen=True)
class Vote:
    """One line of a file of votes. left, right: the models of the images shown there. kind: "" or
    "mirror", a repeat with the sides exchanged, or "gold", whose right answer is ``expected``."""

    trial: str
    rater: str
    prompt: str
    question: str
    left: str
    right: str
    answer: str
    ms: float | None = None
    kind: str = ""
    expected: str = ""
    version: str = ""

    @property
    def choice(self) -> str:
        """The model that was preferred, or the answer where none was."""
        return {"left": self.left, "right": self.right}.get(self.answer, self.answer)


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Write a blind study of two or more folders of images: OUT/page, a static site for raters
    without the names of models, and OUT/key.json, for you alone."""

    folders: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=FOLDER or FOLDER, two or more, with images of the same names"""
    out: Path = Path("study")
    """a new folder"""
    prompts: Path | None = None
    """a file with the prompt of each image in the order of names; by default as PNGs of sample.py
    and names of T2I-CompBench's form (PROMPT_000000.png) say"""
    size: int | None = None
    """cut all images to their centre square and resize it to so many px (LANCZOS)"""
    questions: tuple[Question, ...] = ("quality", "alignment")
    """passes of a rater, in this order; alignment shows the prompt"""
    per_rater: int = 50
    """pairs of images that a rater judges, once for each question"""
    judgements: int = 3
    """sheets on which each pair is, so the least number of raters of each"""
    seed: int = 0
    """of the sheets; the same seed and images give the same study"""

    def __post_init__(self):
        if len(self.folders) < 2:
            raise UserError("give two or more folders of images: NAME=FOLDER NAME=FOLDER")
        if min(self.per_rater, self.judgements, self.size or 1) < 1 or self.seed < 0:
            raise UserError("per-rater, judgements and size: at least 1; seed: at least 0")
        if not self.questions or len(set(self.questions)) < len(self.questions):
            raise UserError("questions: each of quality and alignment at most once, at least one")

    def named(self) -> dict[str, Path]:
        """Model → its folder."""
        found = {}
        for folder in self.folders:
            match = re.fullmatch(r"([^/=]+)=(.+)", folder)
            name, path = match.groups() if match else (Path(folder).resolve().name, folder)
            found[name] = Path(path)
        if len(found) < len(self.folders):
            raise UserError("two folders have one name: give NAME=FOLDER")
        return found


def build(options: BuildOptions) -> None:
    """Write a study and print its size.

    Raises UserError for folders that do not fit, and where ``options.out`` exists: a study that
    raters have seen must not change.
    """
    folders, out, size, questions = options.named(), options.out, options.size, options.questions
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty: a study is written once, give a new folder")
    sets = {model: ImageSet.open(folder, size) for model, folder in folders.items()}
    names = _names(sets)
    texts = _prompts(sets, names, options.prompts)
    models, rng = list(sets), np.random.default_rng(options.seed)
    numbers = {model: _index(of) for model, of in sets.items()}
    salt = json.dumps([options.seed, [of.identity for of in sets.values()]])

    def opaque(*what) -> str:
        data = json.dumps([salt, *what], ensure_ascii=False).encode("utf-8", "surrogateescape")
        return hashlib.sha256(data).hexdigest()[:16]

    def image(n: int, model: str) -> str:
        return opaque("image", model, names[n])

    trials: dict[str, dict[str, Any]] = {}  # what the page knows
    key: dict[str, dict[str, Any]] = {}

    def add(question: str, n: int, images: Mapping[str, str], *mark, **facts) -> str:
        name = opaque(question, n, sorted(images), *mark)
        shown = {"text": texts[n]} if QUESTIONS[question][1] else {}
        mirror = {"mirror": mark[1]} if mark[:1] == ("mirror",) else {}
        trials[name] = {**shown, "images": sorted(images), **mirror}
        kind = {"kind": mark[0]} if mark else {}
        key[name] = {"prompt": texts[n], "question": question, "images": images, **kind, **facts}
        return name

    pairs = list(itertools.combinations(models, 2))
    items = [(n, pair) for n in range(len(names)) for pair in pairs]
    parts = -(-len(items) // options.per_rater)
    sheets: list[np.ndarray] = []
    for _ in range(options.judgements):
        sheets += np.array_split(rng.permutation(len(items)), parts)
    written: list[list[dict[str, Any]]] = []
    for number, sheet in enumerate(sheets):
        extra, passes = max(1, round(EXTRA * len(sheet))), []
        for question in questions:
            asked = []
            for n, pair in (items[i] for i in sheet):
                asked.append(add(question, n, {image(n, model): model for model in pair}))
            for i in rng.choice(len(sheet), extra, replace=False):
                (n, pair), first = items[sheet[i]], asked[i]
                both = {image(n, model): model for model in pair}
                asked.append(add(question, n, both, "mirror", first))
            for _ in range(extra if QUESTIONS[question][1] else 0):
                n, model = int(rng.integers(len(names))), models[rng.integers(len(models))]
                others = [k for k, text in enumerate(texts) if text != texts[n]]
                if others:
                    both = {image(k, model): model for k in (n, others[rng.integers(len(others))])}
                    gold = add(question, n, both, "gold", number, expected=image(n, model))
                    asked += [gold] * (gold not in asked)
            passes.append({"question": QUESTIONS[question][0], "trials": asked})
        written.append(passes)
    sides = [int(side) for side in next(iter(sets.values())).sides]
    page = {"version": opaque("study"), "sides": sides, "trials": trials, "sheets": written}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        part = Path(folder) / "study"
        shutil.copytree(STATIC, part / PAGE)
        (part / PAGE / "pictures").mkdir()

        def write(model: str, n: int) -> None:
            pixels, _ = sets[model].pixels(numbers[model][names[n]])
            write_png(part / PAGE / "pictures" / f"{image(n, model)}.png", pixels)

        jobs = list(itertools.product(models, range(len(names))))
        with AsyncWriter(write) as writer:
            for job in tqdm(jobs, desc="writing", unit="image"):
                writer.put(*job)
        write_text(part / PAGE / "trials.js", f"const STUDY = {json.dumps(page)};\n")
        facts = {"models": models, "questions": questions, "seed": options.seed, "size": size}
        facts |= {"version": page["version"], "sheets": len(sheets)}
        write_json(part / KEY, {**facts, "trials": key})
        if out.is_dir():
            out.rmdir()
        os.rename(part, out)
    most = max(sum(len(p["trials"]) for p in passes) for passes in written)
    print(f"{len(models)} models, {len(set(texts))} prompts, {len(items)} pairs of images")
    print(f"{len(sheets)} sheets, {most} trials each: so many raters judge all")
    print(f"for raters:     {out / PAGE}\nfor you alone:  {out / KEY}")


def _index(of: ImageSet) -> dict[str, int]:
    """Name without suffix → number."""
    return {str(Path(name).with_suffix("")): number for number, name in enumerate(of.names)}


def _names(sets: Mapping[str, ImageSet]) -> list[str]:
    """The names, without suffixes, that all sets have."""
    first, *others = sets.values()
    names = list(_index(first))
    for other in others:
        if differ := sorted(set(names) ^ set(_index(other))):
            both = f"{first.source} and {other.source} do not hold images of the same names"
            raise UserError(f"{both}: {len(differ)} are in one alone, such as {differ[0]!r}")
        first.check_sides(other)
    return names


def _prompts(sets: Mapping[str, ImageSet], names: Sequence[str], file: Path | None) -> list[str]:
    """The prompt of each image: of the file, or as PNGs of sample.py or names of T2I-CompBench's
    form say it."""
    if file is not None:
        texts = [row.prompt for row in read_prompts(file)]
        if len(texts) != len(names):
            raise UserError(f"{file} has {len(texts)} prompts for {len(names)} images")
        return texts
    for of in sets.values():
        if of.settings:
            found = dict(zip(_index(of), (settings["prompt"] for settings in of.settings)))
            return [found[name] for name in names]
    matches = [_NUMBERED.fullmatch(Path(name).name) for name in names]
    if not all(matches):
        fix = "--prompts FILE, one a line in the order of names"
        raise UserError(f"the images do not say their prompts: {fix}")
    return [match[1] for match in matches if match]


# ---- votes ----


def read_key(study: Path) -> dict[str, Any]:
    """The key.json of a study's folder."""
    try:
        key = json.loads((study / KEY).read_text(encoding="utf-8"))
        return {**key, "trials": dict(key["trials"])}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{study} holds no {KEY} of `evaluate study build`") from None


def resolve(fields: Mapping[str, Any], key: Mapping[str, Any] | None) -> Vote:
    """A vote from one JSON object: as the page sends it (left: an image's name), for which ``key``
    is needed, or as a file of votes holds it (left, right: models). Raises UserError with the field
    and what it must be."""
    needed = ["trial", "rater", "answer", "left"]
    if key is None or "right" in fields:
        needed += ["right", "prompt", "question"]
    if lacking := [name for name in needed if not isinstance(fields.get(name), str | int)]:
        hint = "; --study names the study of a page's votes" * (lacking[0] == "right")
        raise UserError(f"a vote needs {' and '.join(map(repr, lacking))}{hint}")
    known = {field.name for field in dataclasses.fields(Vote)} - {"ms"}
    vote = {name: str(fields[name]) for name in known & fields.keys()}
    milliseconds = fields.get("ms")
    if not isinstance(milliseconds, int | float | None):
        raise UserError(f"ms {milliseconds!r}: a number is needed")
    if vote["answer"] not in ANSWERS:
        raise UserError(f"answer {vote['answer']!r}: one of {', '.join(ANSWERS)}")
    if key is not None:
        if (trial := key["trials"].get(vote["trial"])) is None:
            raise UserError(f"trial {vote['trial']!r} is not of this study")
        if "right" not in vote:
            images = trial["images"]
            if vote["left"] not in images:
                raise UserError(f"image {vote['left']!r} is not of trial {vote['trial']!r}")
            (other,) = images.keys() - {vote["left"]}
            if expected := trial.get("expected"):
                vote["expected"] = "left" if expected == vote["left"] else "right"
            vote |= {name: trial[name] for name in ("prompt", "question", "kind") if name in trial}
            vote |= {"left": images[vote["left"]], "right": images[other]}
    found = Vote(ms=milliseconds, **vote)
    if found.left == found.right and found.kind != "gold":
        raise UserError(f"left and right are both {found.left!r}")
    return found


def read_votes(path: Path, key: Mapping[str, Any] | None = None) -> list[Vote]:
    """The votes of a file, one JSON object a line; a line that occurs twice counts once. Raises
    UserError with the line's number. A last line that was cut off is left out with a Notice."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"no file of votes {path}") from None
    votes: dict[Vote, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError
        except ValueError:
            if number == len(lines):
                warnings.warn(f"{path}: the last line is cut off, left out", Notice, stacklevel=2)
                continue
            raise UserError(f"{path}:{number} is not a JSON object") from None
        try:
            votes[resolve(fields, key)] = None
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
    if not votes:
        raise UserError(f"{path} holds no votes")
    return list(votes)

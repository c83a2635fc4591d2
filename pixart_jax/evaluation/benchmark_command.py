"""``python -m pixart_jax evaluate compbench | geneval | dpg``: images scored by what networks see.

Two steps: images → detections or answers, a file of JSON lines; rules → scores of it."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.evaluation import compbench, dpg, geneval, torch_models
from pixart_jax.evaluation import vision_models as vision
from pixart_jax.evaluation.benchmark_run import BenchmarkOptions, BenchmarkRun, Source
from pixart_jax.evaluation.detections import Object, Row, objects_of
from pixart_jax.evaluation.phrases import TEXTBLOB, Phrasebook
from pixart_jax.files import write_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompbenchOptions(BenchmarkOptions):
    """Score T2I-CompBench++: attributes by BLIP-VQA, places and numbers by a detector, actions by
    CLIP."""

    category: compbench.Category
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpgOptions(BenchmarkOptions):
    """Score DPG-Bench: yes-or-no questions about dense prompts, each prompt's a graph."""

    per_prompt: Literal[1, 4] = 4
    """images of each prompt; 4 are one 2×2 grid"""
    answers: Path | None = None
    """lines {image, part, question, p_yes, p_no} or {…, answer}"""
    vqa: str | None = None
    """instead of --answers: such as Salesforce/blip-vqa-capfilt-large"""


# ---- T2I-CompBench++ ----


def evaluate_compbench(options: CompbenchOptions, flags: Sequence[str] | None = None) -> None:
    """Look, score, print, write; also the official vqa_result.json."""
    category, each = options.category, options.per_prompt
    book = Phrasebook.read(options.questions) if options.questions else Phrasebook(options.tagger)

    def prompts_of(name: str) -> list[str]:
        path = options.find("examples/dataset", f"{name}.txt")
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]

    prompts = prompts_of(f"{category}_val") if options.benchmark or options.save_questions else []
    if options.save_questions:
        digest = book.write(options.save_questions, prompts)
        return print(f"written: {options.save_questions}, by {book.name}, SHA-256 {digest}")
    listed = [f"{p}_{i * each + j:06d}.png" for i, p in enumerate(prompts) for j in range(each)]
    places = [f"samples/{name}" for name in listed]
    run = BenchmarkRun(
        options, flags, prompts, lambda i, j: places[i * each + j], compbench.image_name
    )
    scores: dict[str, dict[str, float]] = {}
    every = _answers(book), _detections(category, book), _similarities(category, book)
    sources = [source for source in every if category in compbench.NEEDS[source.kind]]
    for source in sources:  # every process computes its share of each
        found = run.judge(source, lambda names: listed or sorted(names, key=compbench.number_of))
        if found is not None:
            scores[source.kind] = found
    if len(scores) < len(sources):
        return None
    by = [run.by(source) for source in sources]
    images = list(next(iter(scores.values())))
    kinds = {image: tuple(scores) for image in images}
    if category == "complex":
        lists = [prompts_of(f"complex_val_{kind}") for kind in ("spatial", "action")]
        kinds = {image: compbench.kinds_of(compbench.prompt_of(image), *lists) for image in images}
    results = []
    by_prompt: dict[str, list[float]] = {}
    for image in images:
        score = sum(scores[kind][image] for kind in kinds[image]) / len(kinds[image])
        results.append({"image": image, "score": score})
        by_prompt.setdefault(compbench.prompt_of(image), []).append(score)
    # answers tell whose phrases they answer
    phrases = run.sources.get("answers", {"phrases": book.facts}).get("phrases")
    if phrases and category in compbench.PARSED:
        by.append(f"phrases={phrases['parser']}")
    run.finish(f"{category} ({', '.join(by)})", {category: by_prompt}, results, phrases=phrases)
    form = "{:.4f}" if "answers" in scores else "{}"
    official = [
        {"question_id": n, "answer": form.format(row["score"])} for n, row in enumerate(results)
    ]
    write_json(run.options.out / "vqa_result.json", official, indent=None)


def _answers(book: Phrasebook) -> Source:
    def look(nets, names, images):
        chunks = [book[compbench.prompt_of(name)].chunks for name in names]
        found = vision.yes_and_no(nets["vqa"], images, [[f"{c}?" for c in some] for some in chunks])
        for some, answers in zip(chunks, found):
            rows = zip(some, answers) if some else [("", (1.0, 0.0))]  # nothing to ask
            yield [{"chunk": chunk, "p_yes": yes, "p_no": no} for chunk, (yes, no) in rows]

    return Source(
        kind="answers",
        flags=("vqa",),
        look=look,
        form="an image, a chunk, p_yes and p_no",
        parse=lambda row: (row["chunk"], compbench.certainty(row["p_yes"], row["p_no"])),
        judge=lambda image, answers: compbench.attribute(answers.values()),
        also={"phrases": book.facts},
    )


def _detections(category: str, book: Phrasebook) -> Source:
    deep = category == "3d_spatial"

    def look(nets, names, images):
        prompts = [compbench.prompt_of(name) for name in names]
        found = nets["detector"](images, [compbench.sought(category, p, book[p]) for p in prompts])
        if deep:
            vision.add_depths(nets["depth"], images, found)
        for image, objects in zip(images, found):
            yield [{"size": list(image.shape[1::-1]), "objects": _plain(objects)}]

    def parse(row: Row) -> tuple[str, list[Object]]:
        w, h = (float(side) for side in row["size"])
        objects = objects_of(row)
        if deep and any(one.depth is None for one in objects):
            raise ValueError("3d_spatial needs each object's depth")
        return "", compbench.scaled(objects, (w, h))

    def judge(image: str, found: dict) -> float:
        prompt = compbench.prompt_of(image)
        return compbench.placed(category, prompt, book[prompt], found[""])

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
        prompts = [compbench.prompt_of(name) for name in names]
        if category == "complex":
            prompts = [book[prompt].without_adjectives for prompt in prompts]
        seen = vision.embed_images(nets["clip"], images)
        cosines = (seen * torch_models.embed_texts(nets["clip"], prompts)).sum(-1)
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


def _plain(objects: Iterable[Row]) -> list[Row]:
    """Detections as lines hold them, without masks."""
    return [{name: v for name, v in one.items() if name != "mask"} for one in objects]


# ---- GenEval ----


def evaluate_geneval(options: GenevalOptions, flags: Sequence[str] | None = None) -> None:
    """Look, score, print, write."""
    own = sorted((options.generated or Path("-")).glob("[0-9]*/metadata.jsonl"))
    if options.metadata or options.benchmark or not own:
        own = [options.metadata or options.find("prompts", "evaluation_metadata.jsonl")]
    elif int(own[-1].parent.name) != len(own) - 1:
        raise UserError(
            f"{options.generated}: not {own[-1].parent.name} + 1 folders, from 00000 on"
        )
    metadata = geneval.read_metadata(own)
    prompts = [line["prompt"] for line in metadata]
    run = BenchmarkRun(options, flags, prompts, geneval.place, geneval.image_name)
    if flags is not None and options.generated:
        for n, line in enumerate(metadata):
            write_json(options.generated / f"{n:05d}" / "metadata.jsonl", line, indent=None)

    def listed(found: Iterable[str]) -> list[str]:
        each = options.per_prompt or 1 + max(int(Path(name).stem) for name in found)
        return [geneval.place(i, j) for i in range(len(metadata)) for j in range(each)]

    def line_of(name: str) -> Row:
        return metadata[int(name.split("/")[0])]

    def look(nets, names, images):
        clauses = [line_of(name)["include"] for name in names]
        asked = [[clause["class"] for clause in some] for some in clauses]
        found = nets["detector"](images, asked)
        colours_of = functools.partial(vision.colours, nets["clip"])
        for some, image, objects in zip(clauses, images, found):
            coloured = {clause["class"] for clause in some if "color" in clause}
            vision.add_colours(colours_of, image, objects, coloured)
            yield [{"objects": _plain(objects)}]

    source = Source(
        kind="detections",
        flags=("detector", "clip"),
        look=look,
        form="an image and objects, each with class, score and box",
        parse=lambda row: ("", objects_of(row)),
        judge=lambda image, found: geneval.judge(line_of(image), found[""]),
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
    absent = [tag for tag in geneval.TAGS if tag not in tasks]
    run.finish(f"geneval ({run.by(source)})", tasks, results, absent=absent)


# ---- DPG-Bench ----


def evaluate_dpg(options: DpgOptions, flags: Sequence[str] | None = None) -> None:
    """Look, score, print, write."""
    graphs, parts = dpg.read_graphs(options.find("dpg_bench", "dpg_bench.csv")), options.per_prompt
    items = {f"{item}.png": graph for item, graph in graphs.items()}
    prompts = [graph.prompt for graph in graphs.values()]
    run = BenchmarkRun(options, flags, prompts, lambda i, j: list(items)[i])

    def look(nets, names, images):
        for name, image in zip(names, images):
            h, w = (side // (1 if parts == 1 else 2) for side in image.shape[:2])
            some = [image[y : y + h, x : x + w] for y in (0, h) for x in (0, w)][:parts]
            asked = items[name].questions
            texts = [question.text for question in asked.values()]
            found = vision.yes_and_no(nets["vqa"], some, [texts] * parts)
            yield [
                {"part": part, "question": number, "p_yes": yes, "p_no": no}
                for part, answers in enumerate(found)
                for number, (yes, no) in zip(asked, answers)
            ]

    def judge(image: str, answers: dict[tuple[int, int], bool]) -> list[dict[int, bool]]:
        asked = items[image].questions
        if answers.keys() != {(part, number) for part in range(parts) for number in asked}:
            wanted = f"{len(asked)} questions of {parts} parts"
            raise UserError(
                f"{options.answers or options.out}: {image}: not the answers to {wanted}"
            )
        return [{number: answers[part, number] for number in asked} for part in range(parts)]

    source = Source(
        kind="answers",
        flags=("vqa",),
        look=look,
        form="an image, its part, a question's number, and p_yes and p_no, or answer,",
        parse=lambda row: ((int(row["part"]), int(row["question"])), dpg.is_yes(row)),
        judge=judge,
    )
    answers = run.judge(source, lambda found: list(items))
    if answers is None:
        return
    scores = {
        image: [100 * items[image].score(part) for part in of] for image, of in answers.items()
    }
    categories: dict[str, list[bool]] = {}
    for image, of in answers.items():
        for number, question in items[image].questions.items():
            kind = question.category.split("-")[0].strip()
            categories.setdefault(kind, []).extend(part[number] for part in of)
    results = [{"image": image, "score": float(np.mean(of))} for image, of in scores.items()]
    shares = {kind: 100 * float(np.mean(of)) for kind, of in sorted(categories.items())}
    metric = f"dpg ({run.by(source)})"
    run.finish(metric, {"dpg": scores}, results, categories=shares)

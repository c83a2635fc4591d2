"""DPG-Bench's questions (Hu et al. 2024, arXiv:2403.05135) and the score of their answers.

A dense prompt is a graph of propositions, each with a yes-or-no question; a question whose parent
is answered no counts as no. Unlike the published script this one asks the first question of the
file too, and its categories are means over all images of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.evaluation.benchmark import BenchmarkOptions, BenchmarkRun, Source, parsed
from pixart_jax.evaluation.torch_models import yes_and_no


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpgOptions(BenchmarkOptions):
    """Score DPG-Bench: yes-or-no questions about dense prompts, each prompt's a graph."""

    per_prompt: Literal[1, 4] = 4
    """images of each prompt; 4 are one 2×2 grid"""
    answers: Path | None = None
    """lines {image, part, question, p_yes, p_no} or {…, answer}"""
    vqa: str | None = None
    """instead of --answers: such as Salesforce/blip-vqa-capfilt-large"""


def evaluate_dpg(options: DpgOptions, flags: Sequence[str] | None = None) -> None:
    """Look, score, print, write."""
    graphs, parts = read_graphs(options.find("dpg_bench", "dpg_bench.csv")), options.per_prompt
    items = {f"{item}.png": graph for item, graph in graphs.items()}
    prompts = [graph.prompt for graph in graphs.values()]
    run = BenchmarkRun(options, flags, prompts, lambda i, j: list(items)[i])

    def look(nets, names, images):
        for name, image in zip(names, images):
            h, w = (side // (1 if parts == 1 else 2) for side in image.shape[:2])
            some = [image[y : y + h, x : x + w] for y in (0, h) for x in (0, w)][:parts]
            asked = items[name].questions
            texts = [question.text for question in asked.values()]
            found = yes_and_no(nets["vqa"], some, [texts] * parts)
            yield [
                {"part": part, "question": number, "p_yes": yes, "p_no": no}
                for part, answers in enumerate(found)
                for number, (yes, no) in zip(asked, answers)
            ]

    def judge(image: str, answers: dict[tuple[int, int], bool]) -> list[dict[int, bool]]:
        asked = items[image].questions
        if answers.keys() != {(part, number) for part in range(parts) for number in asked}:
            wanted = f"not the answers to {len(asked)} questions of {parts} parts"
            raise UserError(f"{options.answers or options.out}: {image}: {wanted}")
        return [{number: answers[part, number] for number in asked} for part in range(parts)]

    source = Source(
        kind="answers",
        flags=("vqa",),
        look=look,
        form="an image, its part, a question's number, and p_yes and p_no, or answer,",
        parse=lambda row: ((int(row["part"]), int(row["question"])), is_yes(row)),
        judge=judge,
    )
    answers = run.judge(source, lambda found: list(items))
    if answers is None:
        return
    scores = {image: [100 * items[image].score(one) for one in of] for image, of in answers.items()}
    categories: dict[str, list[bool]] = {}
    for image, of in answers.items():
        for number, question in items[image].questions.items():
            kind = question.category.split("-")[0].strip()
            categories.setdefault(kind, []).extend(part[number] for part in of)
    results = [{"image": image, "score": float(np.mean(of))} for image, of in scores.items()]
    shares = {kind: 100 * float(np.mean(of)) for kind, of in sorted(categories.items())}
    metric = f"dpg ({run.by(source)})"
    run.finish(metric, {"dpg": scores}, results, categories=shares)


# ---- rules ----


@dataclasses.dataclass(frozen=True)
class Question:
    """parents: numbers of the questions that it depends on. category: such as 'entity - whole'."""

    text: str
    parents: tuple[int, ...]
    category: str


@dataclasses.dataclass(frozen=True)
class Graph:
    """A prompt and its questions by number, in the file's order."""

    prompt: str
    questions: dict[int, Question]

    def score(self, answers: Mapping[int, bool]) -> float:
        """The share of yes, after what follows from a no. answers: of every question."""
        yes = dict(answers)
        for number, question in self.questions.items():  # in order: a no is handed down
            yes[number] &= all(yes[parent] for parent in question.parents)
        return sum(yes[number] for number in self.questions) / len(self.questions)


def is_yes(row: Mapping[str, Any]) -> bool:
    """A line's answer: yes or no, or the likelier of p_yes and p_no. Raises KeyError, TypeError or
    ValueError for another form."""
    if "answer" not in row:
        return float(row["p_yes"]) > float(row["p_no"])
    if row["answer"] not in ("yes", "no"):
        raise ValueError(f"answer {row['answer']!r}")
    return row["answer"] == "yes"


def read_graphs(path: Path) -> dict[str, Graph]:
    """Item → its graph, from dpg_bench.csv. Raises UserError for a row that does not fit."""
    graphs: dict[str, Graph] = {}

    def parse(row: Mapping[str, Any]) -> tuple[str, str, int, Question]:
        parents = tuple(int(n) for n in row["dependency"].split(",") if int(n))
        category = row["tuple"].split("(")[0].strip()
        question = Question(row["question_natural_language"], parents, category)
        return row["item_id"], row["text"], int(row["proposition_id"]), question

    rows = parsed(path, "a row of DPG-Bench's question table", parse)
    for _, (item, text, number, question) in rows:
        graphs.setdefault(item, Graph(text, {})).questions[number] = question
    for item, graph in graphs.items():
        asked = {parent for question in graph.questions.values() for parent in question.parents}
        if unknown := asked - graph.questions.keys():
            raise UserError(f"{path}: {item} depends on questions that it lacks: {sorted(unknown)}")
    if not graphs:
        raise UserError(f"{path} holds no questions")
    return graphs

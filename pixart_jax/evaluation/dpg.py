"""DPG-Bench's questions (Hu et al. 2024, arXiv:2403.05135) and the score of their answers.

A dense prompt is a graph of propositions, each with a yes-or-no question; a question whose parent
is answered no counts as no. Unlike the published script this one asks the first question of the
file too, and its categories are means over all images of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pixart_jax.errors import UserError
from pixart_jax.evaluation.detections import parsed


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

    def parse(row: Mapping[str, Any]) -> None:
        graph = graphs.setdefault(row["item_id"], Graph(row["text"], {}))
        parents = tuple(int(n) for n in row["dependency"].split(",") if int(n))
        category = row["tuple"].split("(")[0].strip()
        question = Question(row["question_natural_language"], parents, category)
        graph.questions[int(row["proposition_id"])] = question

    for _ in parsed(path, "a row of DPG-Bench's question table", parse):
        pass
    for item, graph in graphs.items():
        asked = {parent for question in graph.questions.values() for parent in question.parents}
        if unknown := asked - graph.questions.keys():
            raise UserError(f"{path}: {item} depends on questions that it lacks: {sorted(unknown)}")
    if not graphs:
        raise UserError(f"{path} holds no questions")
    return graphs

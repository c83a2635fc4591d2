"""GenEval and T2I-CompBench++ of the shapes world, whose scenes are the truth."""

from __future__ import annotations

import itertools

import pytest

from pixart_jax.data import shapes
from pixart_jax.evaluation import checker, geneval
from pixart_jax.evaluation.phrases import Phrasebook
from pixart_jax.evaluation.tasks import eval_prompts
from tests.evaluation.calls import evaluate, score_of, write_rows

BOOK = Phrasebook.by()


@pytest.fixture(scope="module")
def world():
    """(prompt, what the pixel checker finds in its true image) of each set."""
    prompts = eval_prompts("plain", 30, sets=("single", "count", "pair"))
    return [(p, checker.find_objects(shapes.render(p.scene))) for p in prompts]


def lines_of(found):
    """What a detector that is the checker would write, in px of the image."""
    return [
        {"class": f.shape, "score": 0.99, "color": f.colour}
        | {"box": [f.x - f.radius, f.y - f.radius, f.x + f.radius, f.y + f.radius]}
        for f in found
    ]


def clauses(prompt):
    """The same scene as GenEval's prompts ask for: (tag, include, exclude)."""
    objects, first = prompt.scene.objects, prompt.scene.objects[0]
    clause = {"class": first.shape, "count": len(objects) if prompt.set == "count" else 1}
    if prompt.set == "count":
        yield "counting", [clause], [{**clause, "count": clause["count"] + 1}]
    elif prompt.set == "single":
        yield "single_object", [clause], []
        yield "colors", [{**clause, "color": first.colour}], []
    else:
        other = {"class": objects[1].shape, "count": 1}
        yield "two_object", [other, clause], []
        yield "position", [other, {**clause, "position": [prompt.scene.relation, 0]}], []
        colours = {**other, "color": objects[1].colour}, {**clause, "color": first.colour}
        yield "color_attr", list(colours), []


@pytest.mark.parametrize("shuffled", [False, True])
def test_geneval_of_true_images_and_of_shuffled_captions(world, tmp_path, shuffled):
    metadata, rows = [], []
    for _, group in itertools.groupby(world, key=lambda pair: pair[0].set):
        some = list(group)
        for n, (_, found) in enumerate(some):
            asked = some[(n + 7 * shuffled) % len(some)][0]
            for tag, include, exclude in clauses(asked):
                line = {"tag": tag, "include": include, "exclude": exclude}
                rows.append({"image": f"{len(metadata):05d}/samples/0000.png"})
                rows[-1]["objects"] = lines_of(found)
                metadata.append(line | {"prompt": asked.caption})
    files = write_rows(tmp_path / "m.jsonl", metadata), write_rows(tmp_path / "d.jsonl", rows)
    out = "--out", tmp_path / "out"
    assert evaluate("geneval", "--metadata", files[0], "--detections", files[1], *out) == 0
    score = score_of(tmp_path / "out")
    assert set(score["tasks"]) == set(geneval.TAGS)
    print(score["value"], score["tasks"])
    assert score["value"] <= 0.25 if shuffled else score["value"] >= 0.99


@pytest.mark.parametrize("category", ["spatial", "numeracy", "color"])
def test_compbench_of_true_images_and_of_shuffled_captions(world, tmp_path, category):
    words = "one two three four five six".split()
    relations = {"left of": "on the left of", "right of": "on the right of"}
    relations |= {"above": "on the top of", "below": "on the bottom of"}
    kind = "count" if category == "numeracy" else "pair"
    some = [pair for pair in world if pair[0].set == kind]
    # TextBlob takes the cross of "a cyan cross" for a verb
    some = [pair for pair in some if category != "color" or "cyan" not in pair[0].caption]

    def caption(prompt):
        a, b = prompt.scene.objects[0], prompt.scene.objects[-1]
        if category == "numeracy":
            n = len(prompt.scene.objects)
            plural = shapes.PLURALS.get(a.shape, f"{a.shape}s")
            return f"{words[n - 1]} {plural if n > 1 else a.shape}"
        if category == "color":
            return f"a {a.colour} {a.shape} and a {b.colour} {b.shape}"
        return f"a {a.shape} {relations[prompt.scene.relation]} a {b.shape}"

    def score(shift):
        rows = []
        for n, (_, found) in enumerate(some):
            prompt = caption(some[(n + shift) % len(some)][0])
            image = f"{prompt}_{n:06d}.png"
            if category != "color":
                rows.append({"image": image, "size": [64, 64], "objects": lines_of(found)})
            seen = {f"a {f.colour} {f.shape}" for f in found}
            for chunk in BOOK[prompt].chunks if category == "color" else ():
                yes = 0.99 if chunk in seen else 0.01
                rows.append({"image": image, "chunk": chunk, "p_yes": yes, "p_no": 1 - yes})
        given = "--answers" if category == "color" else "--detections"
        flags = given, write_rows(tmp_path / "lines.jsonl", rows), "--out", tmp_path / "out"
        assert evaluate("compbench", "--category", category, *flags) == 0
        return score_of(tmp_path / "out")["value"]

    true, floor = score(0), score(7)
    print(category, true, floor)
    assert true >= (0.98 if category == "color" else 0.99) and floor <= 0.5

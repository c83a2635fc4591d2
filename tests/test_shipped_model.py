"""The model in assets/ generates what it is asked for: the scores that it was trained to reach,
with its own settings; and with the LoRA beside it the heart, which it never saw."""

from __future__ import annotations

import json

import pytest

from pixart_jax import Pipeline, cli
from pixart_jax.evaluation import command
from pixart_jax.evaluation.checker import find_objects

AIMS = {"colour": 0.98, "shape": 0.95, "counting": 0.95, "position": 0.95, "binding": 0.90}
AIMS["withheld: binding"] = 0.75


@pytest.mark.slow
def test_it_reaches_every_aim_far_above_chance(tmp_path):
    assert cli.run(command.main, ["shapes", "--out", str(tmp_path)]) == 0
    tasks = json.loads((tmp_path / "score.json").read_text())["tasks"]
    scores = {task: tasks[task]["score"] for task in AIMS}
    assert not {task: score for task, score in scores.items() if score < AIMS[task]}
    assert all(tasks[task]["floor"] < 0.4 for task in AIMS)


def test_the_shipped_lora_knows_hearts(root):
    pipe = Pipeline.from_pretrained(root / "assets" / "shapes")
    pipe.load_lora_weights("assets/shapes_heart")
    colours = ["blue", "purple", "pink"]  # which its five pictures do not show
    images = pipe([f"a large {colour} heart" for colour in colours * 2], seed=1)
    found = [find_objects(image)[0] for image in images]
    assert [(f.colour, f.shape) for f in found] == [(colour, "heart") for colour in colours * 2]

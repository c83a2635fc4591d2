"""Scores: a wrong image is wrong in the task that it fails, the floor is chance, and the order does
not matter."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from pixart_jax.config import Config, DataConfig, EvaluateConfig, StageConfig
from pixart_jax.data import shapes
from pixart_jax.errors import UserError
from pixart_jax.evaluation import stage_metrics
from pixart_jax.evaluation.checker import Detection
from pixart_jax.evaluation.shapes_score import score, wilson
from pixart_jax.evaluation.tasks import ALL, MAIN, QUESTIONS, SETS, eval_prompts, judge

EXTRA = shapes.Object("circle", "red", "small", 57.5, 6.5, 4.0)  # in the corner that is always free
replace = dataclasses.replace


@pytest.fixture(scope="module")
def prompts():
    return eval_prompts("plain", 40)


@pytest.fixture(scope="module")
def renders(prompts):
    return [shapes.render(p.scene) for p in prompts]


def scores(prompts, set, change) -> dict[str, float]:
    """Task → score of a set whose objects are changed: change(*objects) → objects."""
    some = [p for p in prompts if p.set == set]
    scenes = [replace(p.scene, objects=tuple(change(*p.scene.objects))) for p in some]
    result = score(some, [shapes.render(scene) for scene in scenes])
    return {task: share.score for task, share in result.tasks.items()}


def test_true_images_score_one_and_blank_ones_zero(prompts, renders):
    result = score(prompts, renders)
    assert {share.score for share in result.tasks.values()} == {1.0}
    assert result.mean.score == result.all_correct.score == 1.0
    assert result.mean.n == 3 * 40 and result.mean.low < 1
    assert set(result.by_attribute()["colour"]) <= set(shapes.COLOURS)
    blank = score(prompts, [np.full((64, 64, 3), 140, np.uint8)] * len(prompts))
    assert {share.score for share in blank.tasks.values()} == {0.0}
    assert blank.mean.score == 0 == blank.mean.floor


def test_a_stage_is_scored_on_the_levels_prompts():
    evaluate = EvaluateConfig(1, ("shapes",), 48)
    data = DataConfig("tfds:shapes/plain")
    stage = StageConfig("words", data=data, evaluate=evaluate, start="fresh")
    vae = SimpleNamespace(config=SimpleNamespace(factor=8))
    frozen = SimpleNamespace(text_states=lambda texts, limit: None, vae=vae)
    measure = stage_metrics.open_metric("shapes", Config("c", (stage,)), stage, frozen, None)
    by_caption = {p.caption: shapes.render(p.scene) for p in eval_prompts("plain", 8)}
    seen = []

    def generate(batch, settings):
        seen.append((settings.seed, len(settings.prompts), batch["mean"].shape[1:3]))
        return [by_caption[prompt] for prompt in settings.prompts]

    found = measure(generate)
    assert found["shapes"] == 1 and found["shapes/binding"] == 1
    assert seen == [(0, 32, (8, 8)), (32, 32, (8, 8))]  # of 40, the last ones repeated


def test_the_floor_is_what_chance_gives():
    prompts = eval_prompts("plain", 150, sets=("single", "count", "pair"))
    tasks = score(prompts, [shapes.render(p.scene) for p in prompts]).tasks
    chance = {
        "colour": (1 / 8, 0.03),
        "shape": (1 / 5, 0.04),
        "size": (1 / 2, 0.04),
        "counting": (1 / 3, 0.04),
        "both colours": (1 / 28, 0.02),
        "both shapes": (1 / 10, 0.04),
    }
    for task, (floor, tolerance) in chance.items():
        assert tasks[task].floor == pytest.approx(floor, abs=tolerance), task
    assert tasks["binding"].floor < 0.02 and tasks["position"].floor < 0.12


def swap_colours(first, second):
    return replace(first, colour=second.colour), replace(second, colour=first.colour)


def exchange_places(first, second):
    return replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (swap_colours, {"binding"}),
        (exchange_places, {"position"}),
        (lambda first, second: (first,), {"both colours", "both shapes", "position", "binding"}),
    ],
    ids=["swapped colours", "exchanged places", "one for two"],
)
def test_a_changed_pair_is_wrong_in_that_task_alone(prompts, change, wrong):
    got = scores(prompts, "pair", change)
    assert got == {task: float(task not in wrong) for task in got} and wrong <= set(got)


@pytest.mark.parametrize(
    ("change", "task", "also"),
    [({"colour": "red"}, "colour", ()), ({"shape": "star"}, "shape", ("object",))],
    ids=["colour", "shape"],
)
def test_another_colour_or_shape_is_wrong_in_that_task(prompts, change, task, also):
    got = scores(prompts, "single", lambda one: (replace(one, **change),))
    singles = [p.scene.objects[0] for p in prompts if p.set == "single"]
    same = np.mean([getattr(one, task) == change[task] for one in singles])
    for name in ("object", "colour", "shape", "size"):
        assert got[name] == pytest.approx(same if name in (task, *also) else 1.0), name


def test_another_size_is_wrong_in_that_task(prompts):
    got = scores(prompts, "single", lambda one: (replace(one, radius=13.0),))
    large = [p.scene.objects[0].size == "large" for p in prompts if p.set == "single"]
    assert got["size"] == pytest.approx(np.mean(large))


@pytest.mark.parametrize(("set", "task"), [("single", "object"), ("count", "counting")])
def test_an_object_too_many_breaks_object_and_counting(prompts, set, task):
    assert scores(prompts, set, lambda *objects: (*objects, EXTRA))[task] == 0.0


def test_the_order_of_images_does_not_matter(prompts, renders):
    rng = np.random.default_rng(3)
    images = [
        renders[rng.integers(len(renders))] if rng.random() < 0.4 else image for image in renders
    ]
    order = rng.permutation(len(prompts))
    straight = score(prompts, images)
    mixed = score([prompts[i] for i in order], [images[i] for i in order])
    for name in ("tasks", "mean", "all_correct"):
        assert getattr(straight, name) == getattr(mixed, name)
    assert 0.3 < straight.mean.score < 0.9


def test_position_is_judged_by_the_two_that_are_meant(prompts):
    scene = next(p.scene for p in prompts if p.set == "pair" and p.scene.relation == "left of")
    places = ((10.0, 32.0), (50.0, 32.0))
    both = zip(scene.objects, places)
    found = [Detection(o.shape, o.colour, *place, 9, 250, 0.95) for o, place in both]
    for some in itertools.permutations([*found, Detection("heart", "none", 60, 60, 13, 530, 0.9)]):
        assert judge("pair", scene, list(some), 1.0)["position"]
    misshapen = replace(found[0], shape="unknown")  # its colour still says which it is
    assert judge("pair", scene, [misshapen, found[1]], 1.0)["position"]
    neither = replace(misshapen, colour="none")
    assert not judge("pair", scene, [neither, found[1]], 1.0)["position"]


def test_scenes_are_fixed_and_apart_from_training():
    assert eval_prompts("rich", 3) == eval_prompts("rich", 3)
    assert eval_prompts("plain", 8)[:5] == eval_prompts("plain", 5)[:5]
    seen = {shapes.scene_at("plain", s, i).seed for s in ("train", "test") for i in range(1000)}
    assert not seen & {p.scene.seed for p in eval_prompts("plain", 50)}


def test_sets_hold_what_their_names_say():
    for level in shapes.COLOURED:
        for p in eval_prompts(level, 20):
            withheld = [(o.colour, o.shape) in shapes.WITHHELD for o in p.scene.objects]
            assert all(withheld) if p.set.startswith("withheld") else not any(withheld)
            assert p.scene.task == SETS[p.set][0]
            assert p.caption == shapes.captions(p.scene)["short"]
    assert {p.set for p in eval_prompts("rich", 1)} == set(SETS)
    assert "three" not in {p.set for p in eval_prompts("plain", 1)}
    dense = eval_prompts("plain", 1, "dense")[0]
    assert dense.caption == shapes.captions(dense.scene)["dense"]
    assert set(MAIN) <= set(QUESTIONS) and ALL not in QUESTIONS


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("plane", 5), "did you mean 'plain'"),
        (("plain", 0), "per-task 0"),
        (("plain", 1, "long"), "short"),
    ],
)
def test_an_unknown_level_or_captions_or_no_images_are_errors(asked, says):
    with pytest.raises(UserError, match=says):
        eval_prompts(*asked)


def test_wilson_against_published_values():
    """Newcombe (1998), method 3: 81/263, 15/148, 0/20, 29/29."""
    for right, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ]:
        assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)

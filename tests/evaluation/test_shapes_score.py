"""Scores: a wrong picture is wrong in the task that it is wrong in, the floor is chance, and the
order does not count."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from pixart_jax.data import shapes
from pixart_jax.errors import UserError
from pixart_jax.evaluation.checker import Detection
from pixart_jax.evaluation.shapes_score import by_attribute, score, wilson
from pixart_jax.evaluation.tasks import ALL, MAIN, QUESTIONS, SETS, eval_prompts, judge


@pytest.fixture(scope="module")
def wanted():
    return eval_prompts("plain", 40)


@pytest.fixture(scope="module")
def renders(wanted):
    return [shapes.render(a.scene) for a in wanted]


def of_set(wanted, name):
    return [a for a in wanted if a.set == name]


def shares(result):
    return {task: share.score for task, share in result.tasks.items()}


def changed(scene: shapes.Scene, *objects: shapes.Object) -> np.ndarray:
    return shapes.render(dataclasses.replace(scene, objects=objects))


def test_true_pictures_score_one(wanted, renders):
    result = score(wanted, renders)
    assert (
        set(shares(result).values()) == {1.0}
        and result.mean.score == result.all_correct.score == 1.0
    )
    assert result.mean.n == 3 * 40 and result.mean.low < 1
    assert set(by_attribute(result)["colour"]) <= set(shapes.COLOURS)


def test_blank_pictures_score_zero(wanted):
    result = score(wanted, [np.full((64, 64, 3), 140, np.uint8)] * len(wanted))
    assert set(shares(result).values()) == {0.0} and result.mean.score == 0 == result.mean.floor


def test_the_floor_is_what_chance_gives():
    wanted = eval_prompts("plain", 150, sets=("single", "count", "pair"))
    floors = {
        task: share.floor
        for task, share in score(wanted, [shapes.render(a.scene) for a in wanted]).tasks.items()
    }
    assert floors["colour"] == pytest.approx(1 / 8, abs=0.03)
    assert floors["shape"] == pytest.approx(1 / 5, abs=0.04)
    assert floors["size"] == pytest.approx(1 / 2, abs=0.04)
    assert floors["counting"] == pytest.approx(1 / 3, abs=0.04)
    assert floors["both colours"] == pytest.approx(1 / 28, abs=0.02)
    assert floors["both shapes"] == pytest.approx(1 / 10, abs=0.04)
    assert floors["binding"] < 0.02 and floors["position"] < 0.12


def test_swapped_colours_break_binding_alone(wanted):
    pairs = of_set(wanted, "pair")
    images = []
    for a in pairs:
        first, second = a.scene.objects
        swap = (
            dataclasses.replace(first, colour=second.colour),
            dataclasses.replace(second, colour=first.colour),
        )
        images.append(changed(a.scene, *swap))
    got = shares(score(pairs, images))
    assert got == {"both colours": 1.0, "both shapes": 1.0, "position": 1.0, "binding": 0.0}


def test_exchanged_places_break_position_alone(wanted):
    pairs = of_set(wanted, "pair")
    images = []
    for a in pairs:
        first, second = a.scene.objects
        there, here = (
            dataclasses.replace(first, x=second.x, y=second.y),
            dataclasses.replace(second, x=first.x, y=first.y),
        )
        images.append(changed(a.scene, there, here))
    result = score(pairs, images)
    assert shares(result) == {
        "both colours": 1.0,
        "both shapes": 1.0,
        "position": 0.0,
        "binding": 1.0,
    }
    assert result.all_correct.score == 0


def test_one_object_for_two_is_no_pair(wanted):
    pairs = of_set(wanted, "pair")
    got = shares(score(pairs, [changed(a.scene, a.scene.objects[0]) for a in pairs]))
    assert set(got.values()) == {0.0}


def test_another_colour_shape_or_size_is_wrong_in_that_task(wanted):
    singles = of_set(wanted, "single")

    def others(**change):
        return shares(
            score(
                singles,
                [
                    changed(a.scene, dataclasses.replace(a.scene.objects[0], **change))
                    for a in singles
                ],
            )
        )

    is_red = np.mean([a.scene.objects[0].colour == "red" for a in singles])
    assert others(colour="red") == {
        "object": 1.0,
        "colour": pytest.approx(is_red),
        "shape": 1.0,
        "size": 1.0,
    }
    is_star = np.mean([a.scene.objects[0].shape == "star" for a in singles])
    assert others(shape="star") == {
        "object": pytest.approx(is_star),
        "colour": 1.0,
        "shape": pytest.approx(is_star),
        "size": 1.0,
    }
    is_large = np.mean([a.scene.objects[0].size == "large" for a in singles])
    assert others(radius=13.0)["size"] == pytest.approx(is_large)


def test_an_object_too_many_breaks_object_and_counting(wanted):
    for name, task in (("single", "object"), ("count", "counting")):
        some = of_set(wanted, name)
        # in the corner that no number of objects stands in
        one_more = shapes.Object("circle", "red", "small", 57.5, 6.5, 4.0)
        got = shares(score(some, [changed(a.scene, *a.scene.objects, one_more) for a in some]))
        assert got[task] == 0.0, name


def test_the_order_of_pictures_does_not_count(wanted, renders):
    rng = np.random.default_rng(3)
    images = [
        renders[rng.integers(len(renders))] if rng.random() < 0.4 else image for image in renders
    ]
    order = rng.permutation(len(wanted))
    straight, mixed = (
        score(wanted, images),
        score([wanted[i] for i in order], [images[i] for i in order]),
    )
    assert (
        straight.tasks == mixed.tasks
        and straight.mean == mixed.mean
        and straight.all_correct == mixed.all_correct
    )
    assert 0.3 < straight.mean.score < 0.9


def test_position_is_judged_by_the_two_that_are_meant():
    scene = next(
        a.scene
        for a in eval_prompts("plain", 40)
        if a.set == "pair" and a.scene.relation == "left of"
    )
    first, second = scene.objects
    place = {first: (10.0, 32.0), second: (50.0, 32.0)}
    found = [Detection(o.shape, o.colour, *place[o], 9, 250, 0.95) for o in scene.objects]
    for some in itertools.permutations([*found, Detection("heart", "none", 60, 60, 13, 530, 0.9)]):
        assert judge("pair", scene, list(some), 1.0)["position"]
    misshapen = dataclasses.replace(found[0], shape="unknown")  # its colour still says which it is
    assert judge("pair", scene, [misshapen, found[1]], 1.0)["position"]
    neither = dataclasses.replace(misshapen, colour="none")
    assert not judge("pair", scene, [neither, found[1]], 1.0)["position"]


def test_scenes_are_fixed_and_apart_from_training():
    assert eval_prompts("rich", 3) == eval_prompts("rich", 3)
    assert eval_prompts("plain", 8)[:5] == eval_prompts("plain", 5)[:5]
    seen = {
        shapes.scene_at("plain", split, i).seed for split in ("train", "test") for i in range(1000)
    }
    assert not seen & {a.scene.seed for a in eval_prompts("plain", 50)}


def test_sets_hold_what_their_names_say():
    for level in shapes.LEVELS:
        for a in eval_prompts(level, 20):
            withheld = [(o.colour, o.shape) in shapes.WITHHELD for o in a.scene.objects]
            assert all(withheld) if a.set.startswith("withheld") else not any(withheld)
            assert a.scene.task == SETS[a.set][0]
            assert a.caption == shapes.captions(a.scene)["short"]
    assert {a.set for a in eval_prompts("rich", 1)} == set(SETS) and "three" not in {
        a.set for a in eval_prompts("plain", 1)
    }
    assert (
        eval_prompts("plain", 1, "dense")[0].caption
        == shapes.captions(eval_prompts("plain", 1)[0].scene)["dense"]
    )
    assert set(MAIN) <= set(QUESTIONS) and ALL not in QUESTIONS


def test_what_cannot_be_asked_is_named():
    with pytest.raises(UserError, match="did you mean 'plain'"):
        eval_prompts("plane", 5)
    with pytest.raises(UserError, match="per-task 0"):
        eval_prompts("plain", 0)
    with pytest.raises(UserError, match="short"):
        eval_prompts("plain", 1, "long")


def test_wilson_against_published_values():
    """Newcombe (1998), method 3: 81/263, 15/148, 0/20, 29/29."""
    for right, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ]:
        assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)

"""The embedded world: scenes depend on (level, split, index) alone, captions are true, objects
stand whole and apart."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from scipy import ndimage

from pixart_jax.data import shapes
from pixart_jax.data.shapes import (
    COLOURED,
    COLOURS,
    GROUNDS,
    LEVELS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZES,
    WITHHELD,
    Object,
    Scene,
)

SPLITS = ("train", "test")
SAMPLE = 150
FIRST = {
    "plain": "a small orange cross right of a small green circle",
    "free": "a large orange triangle above a small red star",
    "rich": "a small cyan triangle below a small dotted orange ring",
    "lit": "a small red circle above a large pink square",
    "aesthetic": "a large yellow square above a large red circle",
    "edges": "three small blue crosses",
    "gallery": "a large orange triangle",
}


scene_at = functools.cache(shapes.scene_at)  # which most tests draw again


def scenes(level: str, split: str = "train", count: int = SAMPLE) -> list[Scene]:
    return [scene_at(level, split, i) for i in range(count)]


def canvases(level: str) -> set[tuple[int, int]]:
    level = LEVELS[level]
    return {m[1:3] for m in level.members} or {c[:2] for c in level.canvases}


# ---- scenes ----


@pytest.mark.parametrize("level", LEVELS)
def test_a_scene_is_the_same_whatever_was_drawn_before(level):
    places = [(split, i) for split in SPLITS for i in range(30)]
    forwards = [shapes.scene_at(level, *place) for place in places]
    backwards = [shapes.scene_at(level, *place) for place in reversed(places)][::-1]
    assert forwards == backwards
    for one, other in zip(forwards[::7], backwards[::7]):
        np.testing.assert_array_equal(shapes.render(one), shapes.render(other))


@pytest.mark.parametrize("level", LEVELS)
def test_scenes_differ_between_indices_and_splits(level):
    seeds = [s.seed for split in SPLITS for s in scenes(level, split)]
    assert len(set(seeds)) == len(seeds)
    assert len({s.to_json() for split in SPLITS for s in scenes(level, split)}) == 2 * SAMPLE


def test_the_first_scene_of_each_level_is_what_it_was():
    """In any process. Scores and trained models stand on these scenes: a change of the world is a
    new version of the data set."""
    for level, caption in FIRST.items():
        assert shapes.captions(shapes.scene_at(level, "train", 0))["short"] == caption


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("split", SPLITS)
def test_withheld_pairs_never_occur_in_a_split(level, split):
    seen = {(o.colour, o.shape) for s in scenes(level, split, 500) for o in s.objects}
    assert not seen & set(WITHHELD)


def test_all_other_pairs_occur_in_training():
    seen = {(o.colour, o.shape) for s in scenes("plain", "train", 3000) for o in s.objects}
    assert seen == set(itertools.product(COLOURS, LEVELS["plain"].shapes)) - set(WITHHELD)


@pytest.mark.parametrize("task", ["single", "count", "pair"])
def test_withheld_only_draws_nothing_else(task):
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = shapes.draw_scene(rng, "plain", task=task, withheld="only")
        assert scene.task == task and {(o.colour, o.shape) for o in scene.objects} <= set(WITHHELD)


@pytest.mark.parametrize("level", LEVELS)
def test_objects_stand_inside_the_picture_and_apart(level):
    for scene in scenes(level, count=30 if level == "rich" else 60):
        assert (scene.height, scene.width) in canvases(level)
        inks = [ink(scene, o) for o in scene.objects]
        for alone in inks:  # a tip may touch the outermost pixels, but covers none of them by half
            border = (alone[0], alone[-1], alone[:, 0], alone[:, -1])
            assert max(edge.max() for edge in border) < 0.5, scene
        for one, other in itertools.combinations(inks, 2):
            assert np.minimum(one, other).sum() == 0, scene


def ink(scene: Scene, obj: Object) -> np.ndarray:
    """The share of each pixel that an object covers, from its distance alone."""
    return np.clip(0.5 - signed_distance(scene, obj), 0, 1)


def signed_distance(scene: Scene, obj: Object) -> np.ndarray:
    y, x = np.mgrid[: scene.height, : scene.width] + 0.5
    cos, sin = math.cos(obj.turn), math.sin(obj.turn)
    p = np.stack([x - obj.x, y - obj.y], -1) @ np.array([[cos, -sin], [sin, cos]])
    return shapes.distance(obj.shape, p, obj.radius)


@pytest.mark.parametrize("level", LEVELS)
def test_a_scene_obeys_its_task_and_relation(level):
    tasks = set()
    for scene in scenes(level):
        tasks.add(scene.task)
        kinds = [(o.shape, o.colour) for o in scene.objects]
        if scene.task in ("single", "count"):
            assert len(set(kinds)) == 1 and scene.relation is None
            assert len(kinds) == 1 if scene.task == "single" else 1 <= len(kinds) <= 3
            continue
        assert len(kinds) == {"pair": 2, "three": 3}[scene.task]
        assert all(len(set(names)) == len(kinds) for names in zip(*kinds))
        a, b = scene.objects[:2]
        dx, dy = b.x - a.x, b.y - a.y
        along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[scene.relation]
        assert along > min(abs(dx), abs(dy)) and along == max(abs(dx), abs(dy))
    assert {"single", "count", "pair"} <= tasks
    assert ("three" in tasks) == (level in ("rich", "gallery"))


def test_in_slots_a_number_of_objects_stands_in_one_way():
    """A short caption names the number and no place: it must not leave the place open."""
    stand: dict[int, set] = {}
    for scene in scenes("plain", count=400):
        if scene.task == "count":
            stand.setdefault(len(scene.objects), set()).add(
                tuple((round(o.x / 8), round(o.y / 8)) for o in scene.objects)
            )
    assert {number: len(ways) for number, ways in stand.items()} == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("level", LEVELS)
def test_sizes_can_be_told_apart(level):
    """Within a picture's scale, every large object is larger than every small one by a tenth and
    more."""
    radii: dict[tuple[float, str], list[float]] = {}
    for scene in scenes(level):
        for o in scene.objects:
            unit = min(scene.height, scene.width) / 64
            scale = 0.8 if o.radius / SIZES[o.size] / unit < 0.9 else 1.0
            radii.setdefault((scale, o.size), []).append(o.radius / unit)
    for scale in {scale for scale, _ in radii}:
        assert min(radii[scale, "large"]) > 1.1 * max(radii[scale, "small"])


def test_a_scene_survives_json():
    for level in LEVELS:
        for scene in scenes(level, count=20):
            assert Scene.from_json(scene.to_json()) == scene
            assert json.loads(scene.to_json())["task"] == scene.task


def test_labels_are_the_kinds_of_single_objects():
    seen = set()
    for scene in scenes("rich", count=600):
        label = shapes.label(scene)
        if len({(o.shape, o.colour) for o in scene.objects}) == 1:
            o = scene.objects[0]
            assert (SHAPES[label // 8], list(COLOURS)[label % 8]) == (o.shape, o.colour)
            seen.add(label)
        else:
            assert label == -1
    assert max(seen) < shapes.NUM_CLASSES and len(seen) > 40


# ---- captions ----

_OBJECT = rf"(?P<size>small|large) (?:(?P<texture>striped|dotted) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"  # noqa: E501


def read_short(caption: str) -> tuple[list[tuple], int, str | None]:
    """A reader of short captions that knows nothing of how they are written: (kinds in order,
    number, relation)."""
    plural = r"\b(cross)es\b|\b(circle|square|triangle|star|ring|diamond|heart)s\b"
    singular = re.sub(plural, lambda m: m[1] or m[2], caption)
    kinds = [
        (m["size"], m["texture"] or "solid", m["colour"], m["shape"])
        for m in re.finditer(_OBJECT, singular)
    ]
    number = NUMBERS.index(caption.split()[0]) if caption.split()[0] in NUMBERS else len(kinds)
    relation = next((r for r in RELATIONS if f" {r} " in caption), None)
    return kinds, number, relation


@pytest.mark.parametrize("level", LEVELS)
def test_short_captions_are_true(level):
    for scene in scenes(level):
        kinds, number, relation = read_short(shapes.captions(scene)["short"])
        drawn = [(o.size, o.texture, o.colour, o.shape) for o in scene.objects]
        assert number == len(drawn) and relation == scene.relation
        assert kinds == (drawn if scene.task in ("pair", "three") else drawn[:1])


@pytest.mark.parametrize("level", LEVELS)
def test_brief_captions_are_the_short_ones_without_sizes_and_half_of_them_without_articles(level):
    articles, bare = {"a", "an"}, []
    for scene in scenes(level):
        brief, short = (shapes.captions(scene)[kind].split() for kind in ("brief", "short"))
        plain = [word for word in short if word not in articles | SIZES.keys()]
        assert [word for word in brief if word not in articles] == plain
        for word, noun in zip(brief, brief[1:]):
            assert word not in articles or (word == "an") == (noun[0] in "aeiou")
        if articles & set(short):
            bare.append(not articles & set(brief))
    assert 0.3 < np.mean(bare) < 0.7


@pytest.mark.parametrize("level", LEVELS)
def test_shapeless_captions_are_the_short_ones_with_object_for_the_shape(level):
    shape = rf"\b(?:{'|'.join(SHAPES)})"
    for scene in scenes(level):
        shapeless, short = (shapes.captions(scene)[kind] for kind in ("shapeless", "short"))
        assert not re.search(shape, shapeless)
        assert shapeless == re.sub(rf"{shape}((?:e?s)?)\b", lambda m: "object" + m[1][-1:], short)


@pytest.mark.parametrize("level", LEVELS)
def test_dense_captions_say_all_that_is_true(level):
    for scene in scenes(level):
        short, dense = shapes.captions(scene)["short"], shapes.captions(scene)["dense"]
        assert dense.startswith(short)
        ground = re.search(r" on a (?:(checked|speckled) )?(\w+) ground\. ", dense)
        assert (ground[1] or "solid", ground[2]) == (scene.ground_texture, scene.ground)
        places = re.findall(r"at the (?:top|bottom)? ?(?:left|right)?|in the middle", dense)
        assert [p.strip() for p in places] == [place(o, scene) for o in scene.objects]
        for o in scene.objects:
            assert re.search(rf"the {o.shape}(?: is|s are|es are) {o.colour} and {o.size}\b", dense)


def place(o: Object, scene: Scene) -> str:
    row = "top" if o.y < scene.height / 3 else "bottom" if o.y >= 2 * scene.height / 3 else ""
    column = "left" if o.x < scene.width / 3 else "right" if o.x >= 2 * scene.width / 3 else ""
    return f"at the {row} {column}".replace("  ", " ").strip() if row or column else "in the middle"


# ---- drawing ----


@pytest.mark.parametrize("level", COLOURED)
def test_renders_are_uint8_and_show_the_colours_they_say(level):
    for scene in scenes(level, count=40):
        image = shapes.render(scene)
        assert image.dtype == np.uint8 and image.shape == (scene.height, scene.width, 3)
        if scene.style == "edges":  # a test below
            continue
        for o in scene.objects:
            inside = image[ink(scene, o) == 1].astype(float)
            chroma = inside - inside.mean(-1, keepdims=True)
            nominal = np.array(COLOURS[o.colour]) - np.mean(COLOURS[o.colour])
            along = chroma @ nominal / (np.linalg.norm(chroma, axis=-1) * np.linalg.norm(nominal))
            assert np.median(along) > 0.97, (scene.style, o)


def test_edge_maps_are_white_lines_on_black_along_the_borders_of_objects():
    """Of every other scene soft ones. A line lies by a border; a border by a line, unless the
    lumas of object and ground are close."""
    drawn, soft = set(), []
    for scene in scenes("edges"):
        image = shapes.render(scene)
        assert image.dtype == np.uint8 and image.shape == (scene.height, scene.width, 3)
        assert np.ptp(image, axis=-1).max() == 0
        if not image.any():  # lumas are equal
            continue
        assert image.max() > 200
        soft.append(len(np.unique(image)) > 2)
        lines = image[..., 0] > 127
        apart = [np.abs(signed_distance(scene, o)) for o in scene.objects]
        assert np.min(apart, 0)[lines].max() < 2.2, scene
        to_line, ground = ndimage.distance_transform_edt(~lines), luma(GROUNDS[scene.ground])
        for o, from_border in zip(scene.objects, apart):
            if abs(luma(COLOURS[o.colour]) - ground) > 30:
                assert (to_line[from_border < 0.5] < 2.5).mean() > 0.9, (scene, o)
                drawn.add(o.shape)
    assert drawn == set(SHAPES) and len(soft) > 0.9 * SAMPLE and 0.3 < np.mean(soft) < 0.7


def luma(rgb: tuple[int, int, int]) -> float:
    return np.dot(rgb, (0.2125, 0.7154, 0.0721))


def test_a_tenth_of_the_gallery_are_edge_maps():
    styles = [scene.style for scene in scenes("gallery", count=2000)]
    assert styles.count("edges") / len(styles) == pytest.approx(0.1, abs=0.02)
    sizes = {(s.height, s.width) for s in scenes("gallery", count=500) if s.style == "edges"}
    assert sizes == {(64, 64), (96, 96)}


@pytest.mark.parametrize("recipe", ["shapes", "shapes_demo"])
def test_a_transformer_never_sees_ring_diamond_and_heart(recipe):
    """They are for adapters: its levels draw five shapes; the autoencoder and the text encoder see
    all eight."""
    config = importlib.import_module(f"configs.{recipe}").get_config()
    sources = {stage.data.source for stage in config.stages}
    levels = [LEVELS[source.removeprefix("tfds:shapes/")] for source in sources]
    assert len(levels) == 2 and not any(level.members for level in levels)
    unseen = {"ring", "diamond", "heart"}
    for level in levels:
        drawn = {o.shape for s in scenes(level.name, count=1000) for o in s.objects}
        assert drawn == set(level.shapes) == set(SHAPES) - unseen
    drawn = {o.shape for s in scenes("gallery", count=1000) for o in s.objects}
    assert drawn == set(SHAPES)


def test_shapes_are_what_their_distance_says():
    """Areas against geometry, in units of radius²."""
    areas = {
        "circle": math.pi,
        "square": 1.72**2,
        "ring": math.pi * (1 - 0.48**2),
        "cross": 4 * 0.34 * (2 * 1.02 - 0.34),
        "diamond": 2 * 0.72 * 1.1,
        "triangle": 1.85,
        "star": 5 * 1.2 * 0.46 * math.sin(math.pi / 5),
    }
    for shape, area in areas.items():
        scene = Scene(256, 256, "white", (Object(shape, "red", "large", 128, 128, 80),), "single")
        assert ink(scene, scene.objects[0]).sum() / 80**2 == pytest.approx(area, rel=0.01), shape


# ---- the data set ----


def test_the_builder_gives_back_every_scene_and_pixel(tmp_path, monkeypatch):
    """Through tensorflow-datasets and PNG, without TensorFlow: pixels to the bit, captions, label
    and scene."""
    from pixart_jax.data import images, shapes_builder

    small = dataclasses.replace(LEVELS["rich"], train=12, test=5)
    config = shapes_builder.ShapesConfig(small)
    monkeypatch.setitem(shapes_builder.Shapes.builder_configs, "rich", config)
    builder = shapes_builder.Shapes(config="rich", data_dir=tmp_path)
    builder.download_and_prepare(file_format="array_record")
    skip = {"image": tfds.decode.SkipDecoding()}
    for split, count in (("train", 12), ("test", 5)):
        source = builder.as_data_source(split=split, decoders=skip)
        assert len(source) == count
        for i in range(count):
            record, scene = dict(source[i]), shapes.scene_at("rich", split, i)
            assert np.array_equal(images.decode(record.pop("image")), shapes.render(scene))
            facts = {k: v.decode() if isinstance(v, bytes) else v for k, v in record.items()}
            assert Scene.from_json(facts.pop("scene")) == scene
            assert facts == shapes.captions(scene) | {
                "task": scene.task,
                "label": shapes.label(scene),
                "count": len(scene.objects),
                "height": scene.height,
                "width": scene.width,
                "key": f"rich-{split}-{i:06d}",
            }
    assert "tensorflow" not in sys.modules

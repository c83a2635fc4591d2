"""T2I-CompBench++, GenEval and DPG-Bench: rules by detections made by hand with the score worked
out on paper, and the files between the two steps."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.evaluation import compbench, dpg, geneval
from pixart_jax.evaluation.benchmark import Object
from pixart_jax.evaluation.phrases import Phrasebook
from tests.evaluation.calls import evaluate, refused, rows_of, score_of, write_rows

BOOK = Phrasebook.by()


def thing(name, score, *box, colour=None, depth=None):
    return Object(name, score, tuple(map(float, box)), colour, depth)


# ---- phrases ----


@pytest.mark.parametrize(
    "prompt, chunks",
    [
        ("a green bench and a red car", ["a green bench", "a red car"]),
        ("a black and white shower curtain", ["a black and white shower curtain"]),
        ("The tall, old tree is near it.", ["The tall, old tree", "it"]),
        ("a key on the left of a dog", ["a key", "a dog"]),  # 'the left' is no thing
        (" and ".join(["a cat"] * 9), ["a cat"] * 8),
    ],
)
def test_noun_phrases_of_a_prompt(prompt, chunks):
    assert list(BOOK[prompt].chunks) == chunks


def test_nouns_and_a_text_without_adjectives():
    assert BOOK["a mouse hidden by a key"].nouns == ["mouse", "key"]
    assert BOOK["a red ball and the small dog"].without_adjectives == "a ball and the dog"


def test_a_table_of_phrases_is_read_back_and_names_its_parser(tmp_path):
    digest = BOOK.write(tmp_path / "table.json", ["a red ball"])
    table = Phrasebook.read(tmp_path / "table.json")
    assert (table.name, table.sha256) == (BOOK.name, digest)
    assert table["a red ball"] == BOOK["a red ball"]
    with pytest.raises(UserError, match="no phrases of 'a blue ball'"):
        table["a blue ball"]


# ---- T2I-CompBench++ ----

LEFT, RIGHT = (0, 200, 100, 300), (300, 200, 400, 300)
LOW = (0, 379, 100, 479)


def spatial(prompt, *found, complex=False):
    return compbench.spatial(prompt, BOOK[prompt], found, complex=complex)


@pytest.mark.parametrize(
    "relation, cat, dog, position",
    [
        ("on the left of", LEFT, RIGHT, 1.0),
        ("on the left of", RIGHT, LEFT, 0.0),
        ("on the right of", RIGHT, LEFT, 1.0),
        ("on the right of", LEFT, RIGHT, 0.0),
        ("on the top of", (0, 0, 100, 100), LOW, 1.0),
        ("on the bottom of", LOW, (0, 0, 100, 100), 1.0),
        ("on the top of", (0, 0, 100, 100), (300, 279, 400, 379), 0.0),  # more right than below
        ("on the left of", (0, 0, 100, 100), (100, 100, 200, 200), 0.0),  # as far each way
        ("on the left of", (0, 0, 100, 100), (82, 0, 182, 100), 1.0),  # overlap 18 / 182 < .1
        ("on the left of", (0, 0, 100, 100), (50, 0, 150, 100), 0.1 / (50 / 150)),
        ("next to", (0, 0, 10, 10), (400, 140, 410, 150), 1.0),  # 150 px in one axis are enough
        ("near", (0, 0, 10, 10), (300, 150, 310, 160), 150 / 300),  # 150 is not less than 150
        ("on side of", (0, 0, 10, 10), (200, 400, 210, 410), 150 / 400),
    ],
)
def test_spatial_relations(relation, cat, dog, position):
    found = thing("cat", 0.9, *cat), thing("dog", 0.8, *dog)
    expected = 0.25 * 0.9 + 0.25 * 0.8 + position / 2
    expected = expected if expected >= 0.5 else 0
    assert spatial(f"a cat {relation} a dog", *found) == pytest.approx(expected)


def test_spatial_scores_below_one_half_are_zero():
    prompt = "a cat on the left of a dog"
    cat, dog = thing("cat", 0.99, *LEFT), thing("dog", 0.99, *LEFT)
    assert spatial(prompt, cat, dog) == 0  # 0.495, no position
    assert spatial(prompt, thing("cat", 1.0, *LEFT)) == 0  # 0.25: one object alone
    assert spatial(prompt, thing("cat", 1, *LEFT), thing("dog", 1, *LEFT)) == 0.5  # not below
    assert spatial(prompt) == 0


def test_spatial_takes_the_surest_box_of_the_exact_label():
    prompt = "a girl on the left of a dog"
    person = thing("person", 0.9, *LEFT), thing("person", 0.8, *RIGHT), thing("dog", 0.8, *RIGHT)
    assert spatial(prompt, *person) == pytest.approx(0.25 * 1.7 + 0.5)
    assert spatial(prompt, thing("girl", 1, *LEFT), thing("hot dog", 1, *RIGHT)) == 0


def test_on_top_of_never_scores_in_complex_prompts():
    prompt = "The white cat was on top of the brown dog."
    cat, dog = thing("cat", 0.9, 0, 0, 100, 100), thing("dog", 0.9, *LOW)
    assert compbench.sought("complex", prompt, BOOK[prompt]) == ["cat", "dog"]
    assert spatial(prompt, cat, dog, complex=True) == 0
    prompt = prompt.replace("on top of", "next to")
    assert spatial(prompt, cat, dog, complex=True) == pytest.approx(0.45 + 0.5)
    assert compbench.sought("complex", "The dog and cat", BOOK["The dog and cat"]) == []


def test_boxes_are_compared_at_the_benchmarks_size():
    (one,) = compbench.scaled([thing("cat", 0.2, 0, 0, 512, 1024)], (512, 1024))
    assert one.box == (0, 0, 240, 480)  # the short side is cut to int(480 · 479 / 958)
    (one,) = compbench.scaled([thing("cat", 0.2, 0, 0, 64, 64)], (64, 64))
    assert one.box == (0, 0, 479, 479)
    assert compbench.scaled([thing("cat", 0.1, 0, 0, 1, 1)], (64, 64)) == []


@pytest.mark.parametrize(
    "words, near, far, dog, position",
    [
        ("in front of", 0.8, 0.3, (0, 0, 100, 60), 1.0),  # overlap 0.6
        ("in front of", 0.3, 0.8, (0, 0, 100, 60), 0.0),
        ("in front of", 0.8, 0.3, (0, 0, 100, 50), 0.0),  # of exactly one half
        ("in front of", 0.8, 0.3, (0, 0, 100, 25), 0.5),
        ("in front of", 0.8, 0.3, (100, 0, 200, 100), 0.0),  # disjoint
        ("behind", 0.3, 0.8, (0, 0, 100, 25), 0.5),
        ("hidden by", 0.3, 0.8, (0, 0, 100, 60), 1.0),
        ("hidden by", 0.8, 0.3, (0, 0, 100, 60), 0.0),
    ],
)
def test_spatial_3d_relations(words, near, far, dog, position):
    prompt = f"a cat {words} a dog"
    found = thing("cat", 0.9, 0, 0, 100, 100, depth=near), thing("toy dog", 0.4, *dog, depth=far)
    expected = 0.25 * 1.3 + position / 2
    assert compbench.spatial_3d(prompt, BOOK[prompt], found) == pytest.approx(expected)
    assert compbench.spatial_3d(prompt, BOOK[prompt], found[:1]) == 0.25 * 0.9  # without the cut


def test_spatial_3d_takes_the_last_box_before_both_are_found():
    prompt = "a cat in front of a dog"
    cats = [thing("cat", s, 0, 0, 100, 100, depth=0.5) for s in (0.9, 0.7)]
    dog = thing("dog", 0.6, 200, 0, 300, 100, depth=0.5)
    late = thing("cat", 0.3, 0, 0, 1, 1, depth=0.5)
    both = compbench.spatial_3d(prompt, BOOK[prompt], [*cats, dog, late])
    assert both == pytest.approx(0.25 * (0.7 + 0.6))
    assert compbench.spatial_3d(prompt, BOOK[prompt], cats) == 0.25 * 0.9


def apart(name, count):
    return [thing(name, 0.9, 100 * n, 0, 100 * n + 50, 50) for n in range(count)]


@pytest.mark.parametrize("count, score", [(0, 0), (1, 0.5), (2, 1), (3, 0.5)])
def test_numeracy_is_half_for_presence_and_half_for_the_number(count, score):
    assert compbench.numeracy("two boys", apart("person", count)) == score


def test_numeracy_merges_boxes_and_takes_labels_that_hold_the_noun():
    twice = [*apart("dog", 2), thing("dog", 0.5, 0, 0, 50, 51)]  # nearly the first
    within = thing("dog", 0.5, 101, 1, 120, 20)  # inside the second
    assert compbench.numeracy("two dogs", [*twice, within]) == 1
    assert compbench.numeracy("two dogs", [*twice, thing("hot dog", 0.5, 0, 0, 50, 51)]) == 1
    assert compbench.numeracy("two dogs", apart("hot dog", 2)) == 1
    both = [*apart("dog", 2), *apart("sailing boat", 1)]
    assert compbench.numeracy("three dogs and a ship", both) == 0.25 + 0.5


def test_numbers_of_a_prompt():
    assert compbench.numbers("two sheep, three women and a knife in a garden") == [
        ("sheep", 2),
        ("woman", 3),
        ("knife", 1),
    ]
    assert compbench.numbers("two circles") == [("circle", 2)]  # none that the benchmark counts


def test_attributes_are_products_of_rounded_certainties():
    third = compbench.certainty(0.1, 0.2)
    assert third == 0.3333
    assert compbench.attribute([third, third]) == 0.1111
    assert compbench.attribute([]) == 1


def test_complex_prompts_are_scored_by_their_list():
    lists = {"The red cat is near it."}, {"A dog runs."}
    for prompt, kinds in [
        ("the red cat is near it.", ("answers", "detections")),
        ("A dog runs.", ("answers", "similarities")),
        ("A boy sits near it.", ("answers", "detections", "similarities")),
    ]:
        assert compbench.kinds_of(prompt, *lists) == kinds


# ---- GenEval ----

ONE = {"class": "bench", "count": 1}
CAR = {"class": "car", "count": 1}
A, B = (0, 0, 100, 100), (300, 0, 400, 100)


def wrong(tag, include, *found, exclude=()):
    metadata = {"tag": tag, "include": include, "exclude": exclude, "prompt": "…"}
    return geneval.judge(metadata, sorted(found, key=lambda one: -one.score))


def test_geneval_objects_must_be_above_the_threshold():
    assert not wrong("single_object", [ONE], thing("bench", 0.31, *A))
    assert wrong("single_object", [ONE], thing("bench", 0.3, *A)) == ["0 of 1 bench"]
    assert not wrong("two_object", [ONE, CAR], thing("bench", 0.5, *A), thing("car", 0.5, *A))
    assert wrong("two_object", [ONE, CAR], thing("bench", 0.5, *A))
    mouse = {"class": "computer mouse", "count": 1}
    assert not wrong("single_object", [mouse], thing("mouse", 0.5, *A))


@pytest.mark.parametrize("count, right", [(2, False), (3, True), (4, False)])
def test_geneval_counts_exactly(count, right):
    include, exclude = [{"class": "bench", "count": 3}], [{"class": "bench", "count": 4}]
    found = [thing("bench", 0.91, *A)] * count + [thing("bench", 0.9, *A)] * 3
    assert (not wrong("counting", include, *found, exclude=exclude)) == right


def test_geneval_keeps_sixteen_objects_of_a_class():
    include, exclude = [{"class": "bench", "count": 16}], [{"class": "bench", "count": 17}]
    assert not wrong("counting", include, *[thing("bench", 0.99, *A)] * 20, exclude=exclude)


def test_geneval_colours_are_those_of_the_surest_objects():
    clause = [{**ONE, "color": "red"}]
    red, blue = thing("bench", 0.8, *A, colour="red"), thing("bench", 0.9, *B, colour="blue")
    assert not wrong("colors", clause, red)
    assert wrong("colors", clause, red, blue) == ["bench is blue, not red"]
    assert wrong("colors", clause, thing("bench", 0.9, *A))  # no colour matches none


@pytest.mark.parametrize(
    "box, expected",
    [
        (B, {"right of"}),
        ((-300, 0, -200, 100), {"left of"}),
        ((0, 300, 100, 400), {"below"}),
        ((300, 300, 400, 400), {"right of", "below"}),
        ((300, -300, 400, -200), {"right of", "above"}),
        ((20, 0, 120, 100), set()),  # 20 px: a tenth of both widths
        ((36, 0, 136, 100), set()),  # 16 of 36 px beyond the margin
        ((44, 0, 144, 100), {"right of"}),  # 24 of 44
        (A, set()),
    ],
)
def test_geneval_positions(box, expected):
    assert geneval.relations(thing("a", 1, *box), thing("b", 1, *A)) == expected


def test_geneval_position_needs_its_target_and_every_pair():
    clauses = [{"class": "bench", "count": 2}, {**CAR, "position": ["right of", 0]}]
    benches = thing("bench", 0.9, *A), thing("bench", 0.8, 0, 200, 100, 300)
    assert not wrong("position", clauses, *benches, thing("car", 0.9, *B))
    between = thing("bench", 0.85, 300, 200, 400, 300)
    assert wrong("position", clauses, benches[0], between, thing("car", 0.9, *B))
    reasons = wrong("position", clauses, benches[0], thing("car", 0.9, *B))
    assert reasons == ["1 of 2 bench", "nothing for car to be right of"]


def test_an_object_is_cut_out_on_grey():
    image = np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)
    mask = np.zeros((5, 6), bool)
    mask[1:4, 2:5] = True
    mask[2, 3] = False
    cut = geneval.crop(image, [2, 1, 5, 4], mask)
    assert cut.shape == (3, 3, 3)
    assert (cut[1, 1] == 0x99).all()  # #999
    outside = np.ones((3, 3), bool)
    outside[1, 1] = False
    np.testing.assert_array_equal(cut[outside], image[1:4, 2:5][outside])
    assert geneval.crop(image, [5.6, 4.7, 5.9, 5.0], None).shape == (1, 1, 3)


# ---- DPG-Bench ----

CSV = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
CSV += """question_natural_language
p1,"a dog, in a hat",,1,0,entity,whole,entity - whole (dog),Is there a dog?
p1,"a dog, in a hat",,2,1,entity,whole,entity - whole (hat),Is there a hat?
p1,"a dog, in a hat",,3,"1,2",relation,spatial,relation - spatial (in),Does the dog wear it?
p2,a red ball,,1,0,entity,whole,entity - whole (ball),Is there a ball?
"""


def test_dpg_hands_a_no_down_the_graph(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text(CSV)
    graph = dpg.read_graphs(tmp_path / "dpg_bench.csv")["p1"]
    assert len(graph.questions) == 3  # the first row counts
    assert graph.questions[3].parents == (1, 2)
    for answers, score in [((1, 1, 1), 1), ((1, 1, 0), 2 / 3), ((1, 0, 1), 1 / 3), ((0, 1, 1), 0)]:
        assert graph.score(dict(zip((1, 2, 3), map(bool, answers)))) == score


def test_dpg_scores_from_answers(tmp_path, capsys):
    (tmp_path / "dpg_bench.csv").write_text(CSV)
    rows = [
        {"image": f"{item}.png", "part": part, "question": n, "p_yes": 0.6, "p_no": 0.3}
        for item, count in (("p1", 3), ("p2", 1))
        for part in range(4)
        for n in range(1, count + 1)
    ]
    rows[0] |= {"answer": "no"}  # part 0 of p1: all three fall
    flags = "--benchmark", tmp_path, "--out", tmp_path / "out"
    answers = write_rows(tmp_path / "answers.jsonl", rows)
    assert evaluate("dpg", "--answers", answers, *flags) == 0
    score = score_of(tmp_path / "out")
    assert score["metric"] == "dpg (vqa=answers.jsonl)"
    assert score["value"] == pytest.approx(100 * (7 / 8))
    assert score["categories"] == {"entity": pytest.approx(100 * 11 / 12), "relation": 100}
    write_rows(answers, rows[:-1])
    error = refused(capsys, "dpg", "--answers", answers, *flags)
    assert "p2.png: not the answers to 1 questions of 4 parts" in error


# ---- the files between the two steps ----


def row(image, *objects, **more):
    listed = [{"class": name, "score": score, "box": box} for name, score, box in objects]
    return {"image": image, "objects": listed, **more}


def test_geneval_from_a_file(tmp_path, capsys):
    lines = [
        {"tag": "single_object", "include": [ONE], "prompt": "a photo of a bench"},
        {"tag": "two_object", "include": [ONE, CAR], "prompt": "a photo of a bench and a car"},
    ]
    metadata = write_rows(tmp_path / "metadata.jsonl", lines)
    bench, car = ("bench", 0.9, A), ("car", 0.8, B)
    rows = [
        row("00001/samples/0001.png", car),
        row("out/00001/samples/0000.png", bench, car),
        row("00000/samples/0000.png", car, bench),
        row("00000/samples/0001.png", bench),
    ]
    flags = "--metadata", metadata, "--out", tmp_path / "out", "--detections"
    assert evaluate("geneval", *flags, write_rows(tmp_path / "d.jsonl", rows)) == 0
    score = score_of(tmp_path / "out")
    assert score["tasks"] == {"single_object": 1, "two_object": 0.5} and score["value"] == 0.75
    assert score["absent"] == ["counting", "colors", "position", "color_attr"]
    results = rows_of(tmp_path / "out/results.jsonl")
    names = [f"0000{i}/samples/000{j}.png" for i in (0, 1) for j in (0, 1)]
    assert [r["image"] for r in results] == names
    assert results[3]["reason"] == "0 of 1 bench" and not results[3]["correct"]
    assert "absent, and not in the mean: counting" in capsys.readouterr().out
    for some, message in [
        (rows[:-1], "d.jsonl: 1 of 4 images of the list are missing, the first is " + names[1]),
        ([*rows, row("00002/samples/0000.png")], "00002/samples/0000.png is not in the list"),
        ([*rows, rows[0]], "d.jsonl, line 5: a second line of 00001/samples/0001.png"),
        ([row("a.png")], "d.jsonl, line 1: an image and objects"),
        ([row(names[0], ("bench", 0.9, [3, 0, 1, 1]))], "d.jsonl, line 1: an image"),
    ]:
        file = write_rows(tmp_path / "d.jsonl", some)
        assert message in refused(capsys, "geneval", *flags, file)


def test_compbench_from_answers_and_the_benchmarks_list(tmp_path, capsys):
    (tmp_path / "color_val.txt").write_text("a green bench and a red car\r\na blue cup")
    names = [f"a green bench and a red car_00000{n}.png" for n in (0, 1)]
    names += [f"a blue cup_00000{n}.png" for n in (2, 3)]
    rows = [{"image": name, "chunk": "a", "p_yes": 0.3, "p_no": 0.1} for name in names]
    rows.append({"image": names[0], "chunk": "b", "p_yes": 0.1, "p_no": 0.1})
    flags = "--category", "color", "--out", tmp_path / "out", "--answers"
    assert evaluate("compbench", *flags, write_rows(tmp_path / "a.jsonl", rows)) == 0
    score = score_of(tmp_path / "out")
    assert score["value"] == pytest.approx((0.375 + 3 * 0.75) / 4)
    assert score["metric"] == "color (vqa=a.jsonl)"
    official = json.loads((tmp_path / "out/vqa_result.json").read_text())
    assert official[0] == {"question_id": 0, "answer": "0.3750"}
    listed = "--benchmark", tmp_path, "--per-prompt", 2
    assert evaluate("compbench", *flags, tmp_path / "a.jsonl", *listed) == 0
    error = refused(capsys, "compbench", *flags, tmp_path / "a.jsonl", *listed[:2])
    assert "18 of 20 images of the list are missing" in error
    table = "--save-questions", tmp_path / "table.json", "--benchmark", tmp_path
    assert evaluate("compbench", "--category", "color", "--out", tmp_path, *table) == 0
    assert "SHA-256" in capsys.readouterr().out
    assert Phrasebook.read(tmp_path / "table.json")["a blue cup"].chunks == ("a blue cup",)


@pytest.mark.parametrize(
    "argv, message",
    [
        ("geneval --detections no.jsonl --metadata m.jsonl", "m.jsonl"),
        ("geneval --detections d.jsonl", "give --benchmark DIR"),
        ("compbench --category spatial", "give --detections FILE, or --images DIR with --detector"),
        ("compbench --category 3d_spatial --detections d.jsonl", "needs each object's depth"),
        ("compbench --category color --answers d.jsonl", "d.jsonl, line 1: an image, a chunk"),
        ("compbench --category spatial --detections d.jsonl --questions d.jsonl", "not a table"),
        ("dpg --answers d.jsonl", "dpg_bench.csv"),
        ("dpg --answers d.jsonl --benchmark .", "holds no dpg_bench.csv"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    image = row("a cat behind a dog_000000.png", ("cat", 0.9, A), ("dog", 0.9, B), size=[9, 9])
    write_rows(tmp_path / "d.jsonl", [image])
    assert message in refused(capsys, *argv.split(), "--out", "out")
    assert not (tmp_path / "out/score.json").exists()

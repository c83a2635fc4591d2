"""The nouns of captions: counts known by hand, the same whatever the processes and the memory, and
bad captions named."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pixart_jax.captioning import noun_report, nouns_command, taggers
from pixart_jax.captioning.nouns import Lengths, NounOptions, count
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources.folder import FolderSource
from pixart_jax.data.sources.webdataset import WebdatasetSource
from pixart_jax.errors import UserError
from tests.captioning import written_captions
from tests.encoding import tiny_encoders

# Counted by hand. dog 3, cat 2, table 1, beach 1, dogs 1, york 1 (New York is two words), tail 1,
# grass 1
BY_HAND = {
    "a": "A dog and a cat sit on a wooden table.",
    "b": "Two dogs run on the beach. The Dog isn't wet.",
    "c": "The dog's tail is long, and the cat's not.",
    "d": "They were running and it was very green.",
    "e": "New York in the grass!",
}
COUNTS = {
    "dog": 3,
    "cat": 2,
    "table": 1,
    "beach": 1,
    "dogs": 1,
    "york": 1,
    "tail": 1,
    "grass": 1,
    "new": 1,
}
FEW = NounOptions(workers=1, threshold=1)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def by_hand(tmp_path):
    return jsonl(
        tmp_path / "hand.jsonl", [{"key": key, "caption": text} for key, text in BY_HAND.items()]
    )


def test_counts_are_those_that_a_person_counts(by_hand):
    found = count(str(by_hand), FEW, BadRecords())
    assert dict(found.top()) == COUNTS
    assert (found.images, found.captions, found.total) == (5, 5, sum(COUNTS.values()))
    assert (found.valid, found.distinct) == (2, len(COUNTS))  # more than once: dog, cat
    assert found.average == found.total / 5 and found.ratio == 2 / len(COUNTS)
    assert (
        dict(found.dropped()) == {noun: n for noun, n in COUNTS.items() if n == 1}
        and found.dropped_total == len(COUNTS) - 2
    )
    assert found.words == {10: 2, 9: 1, 8: 1, 5: 1}
    assert count(str(by_hand), dataclasses.replace(FEW, threshold=2), BadRecords()).valid == 1
    assert count(str(by_hand), dataclasses.replace(FEW, threshold=3), BadRecords()).valid == 0


def test_plurals_are_words_of_their_own_unless_asked(by_hand):
    assert (
        dict(count(str(by_hand), dataclasses.replace(FEW, singular=True), BadRecords()).top())[
            "dog"
        ]
        == 4
    )


def test_the_average_is_an_image_s_whatever_the_number_of_its_captions(tmp_path):
    file = jsonl(
        tmp_path / "x.jsonl",
        [
            {"key": "a", "caption": ["A dog.", "A cat."], "short": "A cow."},
            {"caption": "A car.", "key": 2},
        ],
    )
    found = count(str(file), FEW, BadRecords())
    assert (found.images, found.captions, found.total, found.average) == (2, 3, 3, 1.5)
    assert (
        count(str(file), dataclasses.replace(FEW, kind=("caption", "short")), BadRecords()).total
        == 4
    )
    with pytest.raises(UserError, match="no caption of kind 'capton' .did you mean 'caption'"):
        count(str(file), dataclasses.replace(FEW, kind=("capton",)), BadRecords())


# ---- where captions lie ----


def test_every_form_of_a_caption_file_gives_the_same_counts(by_hand, tmp_path):
    rows = [{"key": key, "caption": text} for key, text in BY_HAND.items()]
    with open(tmp_path / "hand.csv", "w", newline="") as out:
        csv.writer(out).writerows(
            [["file_name", "caption"], *([f"{row['key']}.jpg", row["caption"]] for row in rows)]
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "hand.parquet")
    texts = tmp_path / "texts" / "deep"
    texts.mkdir(parents=True)
    for key, text in BY_HAND.items():
        (texts / f"{key}.txt").write_text(text)
    (texts / "a.dense.txt").write_text("An elephant.")  # another kind of a
    pictures = written_captions.folder(tmp_path / "pictures", [0] * 5)
    for file, text in zip(sorted(pictures.glob("*.txt")), BY_HAND.values(), strict=True):
        file.write_text(text)
    first = count(str(by_hand), FEW, BadRecords())
    for what in ("hand.csv", "hand.parquet", "texts", "pictures"):
        faults = BadRecords()
        found = count(str(tmp_path / what), FEW, faults)
        assert (found.top(), found.images, found.words) == (first.top(), 5, first.words), what
        assert found.name in ("hand", "texts", "pictures") and not len(faults)
    assert count(f"folder:{pictures}", FEW, BadRecords()).top() == first.top()


def test_pictures_are_not_read_for_their_captions(tmp_path, monkeypatch):
    folder = written_captions.folder(tmp_path / "pictures", [0] * 3)
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for file in sorted(folder.iterdir()):
            out.add(file, file.name)
    monkeypatch.setattr(WebdatasetSource, "_sample", None)
    monkeypatch.setattr(FolderSource, "_sample", None)
    for what in (tmp_path / "a.tar", folder):
        found = count(str(what), FEW, BadRecords())
        assert found.images == 3 and dict(found.top()) == {"caption": 3}


def test_captions_are_read_out_of_a_tensorflow_dataset(monkeypatch):
    from pixart_jax.captioning import texts

    monkeypatch.setattr(texts, "open_source", lambda *args, **kwargs: tiny_encoders.Noise(20))
    with pytest.raises(UserError, match="several kinds of caption: --kind short or --kind dense"):
        count("tfds:noise", FEW, BadRecords())
    found = count("tfds:noise", dataclasses.replace(FEW, kind=("short", "dense")), BadRecords())
    assert found.images == 20 and found.captions == 50


# ---- exact, whatever the processes and the memory ----


def generated(path, n=3000):
    chance = random.Random(5)
    words = [
        *"dog cat table house tree river car street woman man light shadow".split(),
        *(f"thing{i}a" for i in range(2000)),
    ]
    return jsonl(
        path,
        [
            {
                "key": f"k{i}",
                "caption": f"A {chance.choice(words)} near the {chance.choice(words)}.",
            }
            for i in range(n)
        ],
    )


def test_three_processes_count_what_one_counts(tmp_path):
    file = generated(tmp_path / "x.jsonl")
    one, three = (count(str(file), NounOptions(workers=n), BadRecords()) for n in (1, 3))
    assert (
        one == dataclasses.replace(three, faults=one.faults)
        and one.total == 6000
        and one.images == 3000
    )


def test_quantiles_and_means_are_numpys():
    lengths = np.random.default_rng(0).integers(0, 60, 999)
    mine = Lengths()
    mine.update(lengths.tolist())
    assert mine.mean() == pytest.approx(lengths.mean())
    assert mine.quantile(0.5) == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert mine.quantile(0.95) == np.quantile(lengths, 0.95, method="inverted_cdf")
    assert mine.above(30) == (lengths > 30).sum()


# ---- bad input ----


def test_bad_records_are_named_and_counted_and_the_rest_goes_on(tmp_path):
    file = tmp_path / "bad.jsonl"
    rows = [
        {"key": "a", "caption": "A dog."},
        {"key": "huge", "caption": "word " * 2_000_000},  # 10 MB
        {"key": "silent"},
        {"key": "null", "caption": None},
        {"key": "a", "caption": "A cow."},
        {"key": "bell", "caption": "A \x07cat\x00 sits."},
        {"key": "hash", "caption": f"A {'q' * 500} car."},
    ]
    file.write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
        + "no json\n[1]\n"
        + '{"key": "cut", "caption": "A tr'
    )
    faults = BadRecords()
    found = count(str(file), FEW, faults)
    assert (
        dict(found.top()) == {"dog": 1, "cat": 1, "car": 1}
        and found.images == 3
        and found.too_long == 1
    )
    assert faults.counts == {
        "caption too long": 1,
        "missing caption": 2,
        "key twice": 1,
        "unreadable row": 3,
    }
    assert faults.repaired == {"control characters": 1}
    named = "\n".join(map(str, faults))
    for place in (
        "row 2",
        "row 3 (silent)",
        "row 4 (null)",
        "row 5 (a): key twice",
        "row 6",
        "row 8",
        "row 9",
        "row 10",
    ):
        assert f"bad.jsonl, {place}" in named, named


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"key": "b", "caption": "word " * 2_000_000}, "caption too long"),
        ({"key": "b"}, "missing caption"),
        ({"key": "a", "caption": "A cow."}, "key twice"),
        ({"key": "b", "caption": "A \x07cat."}, "control characters"),
    ],
)
def test_strict_stops_at_the_first(tmp_path, row, kind):
    file = jsonl(
        tmp_path / "bad.jsonl",
        [{"key": "a", "caption": "A dog."}, row, {"key": "c", "caption": "A car."}],
    )
    with pytest.raises(UserError, match=f"bad.jsonl, row 2.*{kind}.*without --strict"):
        count(str(file), FEW, BadRecords(strict=True))


def test_a_parquet_file_that_is_cut_is_one_line(tmp_path):
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"key": ["a"], "caption": ["A dog."]}), file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match="no whole Parquet file"):
        count(str(file), FEW, BadRecords())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "captions"),
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["nowhere"], "unknown source 'nowhere'"),
        (["empty"], "holds no .txt"),
        (["x.jsonl", "--tagger", "textblop"], "did you mean 'textblob'"),
        (["x.jsonl", "--names", "a,b"], "--names has 2 names, and 1 sets"),
        (["x.jsonl", "--threshold", "-1"], "threshold -1"),
        (["x.jsonl", "--tokenizer", "nowhere"], "no tokenizer in nowhere"),
        (["x.jsonl", "--threshhold", "3"], "--threshold"),
        (["none.jsonl"], "holds no caption .1 left out: 1 missing caption"),
        (["picture.png"], "a caption file is one of"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"x")
    jsonl(tmp_path / "x.jsonl", [{"key": "a", "caption": "A dog."}])
    jsonl(tmp_path / "none.jsonl", [{"key": "a", "caption": ""}])
    with pytest.raises(UserError, match=message) as caught:
        nouns_command.main([*arguments, "--out", "out"])
    assert "\n" not in str(caught.value)


def test_nltk_without_its_model_says_what_to_fetch(monkeypatch):
    import nltk

    def absent(words):
        raise LookupError("averaged_perceptron_tagger_eng")

    monkeypatch.setattr(nltk, "pos_tag", absent)
    with pytest.raises(
        UserError, match="nltk.downloader averaged_perceptron_tagger_eng, or --tagger textblob"
    ):
        taggers.open_tagger("nltk")


def test_nltk_with_its_model_is_asked_a_sentence_at_a_time(monkeypatch):
    import nltk

    asked = []
    monkeypatch.setattr(
        nltk,
        "pos_tag",
        lambda words: (
            asked.append(words) or [(word, "NN" if word == "dog" else "DT") for word in words]
        ),
    )
    assert taggers.open_tagger("nltk").nouns("A dog. It isn't a dog!") == (["dog", "dog"], 0)
    assert asked[1:] == [["A", "dog", "."], ["It", "is", "n't", "a", "dog", "!"]]


# ---- what is written ----


def test_two_sets_side_by_side_as_table_json_and_charts(by_hand, tmp_path, capsys):
    from pixart_jax.text import save_tokenizer

    save_tokenizer(tiny_encoders.words(), tmp_path / "tokenizer")
    other = jsonl(
        tmp_path / "other $x$.jsonl",
        [{"key": "a", "caption": "A car, a car."}, {"key": "a", "caption": "A bus."}],
    )
    out = tmp_path / "out"
    arguments = [
        str(by_hand),
        str(other),
        "--out",
        str(out),
        "--threshold",
        "1",
        "--paper",
        "--tokenizer",
        str(tmp_path / "tokenizer"),
    ]
    assert nouns_command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert ["hand", "5", "5", "2", "9", "22.2%", "12", "2.4", "8.4"] in [
        line.split() for line in printed.splitlines()
    ]
    assert ["LAION-LLaVA", "(paper)", "85K", "646K", "13.3%", "233.9M", "20.9"] in [
        line.split() for line in printed.splitlines()
    ]
    assert "1 key twice" in printed and "row 2 (a): key twice" in printed and str(out) in printed
    said = json.loads((out / "nouns.json").read_text())
    assert (
        said["tagger"]["name"] == "textblob"
        and said["tagger"]["version"]
        and said["tagger"]["tags"] == ["NN", "NNS", "NNP", "NNPS"]
    )
    hand, cars = said["sets"]
    assert (hand["VN"], hand["DN"], hand["total_nouns"], hand["average"]) == (2, 9, 12, 2.4)
    assert (
        cars["top"] == [["car", 2]]
        and cars["left_out"] == {"key twice": 1}
        and cars["tokens"]["longest"] > 0
    )
    stem = "other--x-"
    for name in (
        "side_by_side.png",
        "caption_words.png",
        "caption_tokens.png",
        "hand.top_nouns.png",
        f"{stem}.top_nouns.png",
    ):
        assert (out / name).read_bytes().startswith(b"\x89PNG"), name
    assert (out / "hand.dropped_nouns.txt").read_text().splitlines()[0] == "beach\t1"
    assert json.loads((out / f"{stem}.faults.jsonl").read_text())["kind"] == "key twice"


def test_the_papers_ratios_are_as_it_prints_them():
    for valid, distinct, ratio, _, _ in noun_report.PAPER.values():
        assert 100 * valid / distinct == pytest.approx(ratio, abs=0.2)


def test_a_set_of_the_same_name_is_told_apart(by_hand, tmp_path, capsys):
    assert (
        nouns_command.main(
            [str(by_hand), str(by_hand), "--out", str(tmp_path / "out"), "--workers", "1"]
        )
        == 0
    )
    assert [
        one["name"] for one in json.loads((tmp_path / "out" / "nouns.json").read_text())["sets"]
    ] == ["hand", "hand-2"]

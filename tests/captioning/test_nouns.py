"""The nouns of captions: counts known by hand, the same whatever the processes, and bad
captions named."""

from __future__ import annotations

import dataclasses
import json
import random
import tarfile

import nltk
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from pixart_jax.captioning import nouns, nouns_command, texts
from pixart_jax.captioning.nouns import NounOptions, count
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources.folder import FolderSource
from pixart_jax.data.sources.webdataset import WebdatasetSource
from pixart_jax.errors import UserError
from pixart_jax.text import save_tokenizer
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
COUNTS = {"dog": 3, "cat": 2}
COUNTS |= dict.fromkeys("table beach dogs york tail grass new".split(), 1)


def counted(what, faults=None, **options):
    faults = BadRecords() if faults is None else faults
    return count(str(what), NounOptions(**{"workers": 1, "threshold": 1, **options}), faults)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def by_hand(tmp_path):
    rows = [{"key": key, "caption": text} for key, text in BY_HAND.items()]
    return jsonl(tmp_path / "hand.jsonl", rows)


def test_counts_are_those_that_a_person_counts(by_hand):
    found = counted(by_hand)
    assert dict(found.nouns) == dict(found.top()) == COUNTS and found.top()[0] == ("dog", 3)
    assert (found.images, found.captions, found.total) == (5, 5, sum(COUNTS.values()))
    assert (found.valid, found.distinct) == (2, len(COUNTS))  # more than once: dog, cat
    assert found.average == found.total / 5 and found.ratio == 2 / len(COUNTS)
    assert found.dropped() == sorted((noun, 1) for noun, times in COUNTS.items() if times == 1)
    assert found.dropped_total == len(COUNTS) - 2
    assert found.words == {10: 2, 9: 1, 8: 1, 5: 1}
    assert [counted(by_hand, threshold=n).valid for n in (2, 3)] == [1, 0]
    # plurals are words of their own unless asked
    assert counted(by_hand, singular=True).nouns["dog"] == 4


def test_the_average_is_an_image_s_whatever_the_number_of_its_captions(tmp_path):
    several = {"key": "a", "caption": ["A dog.", "A cat."], "short": "A cow."}
    file = jsonl(tmp_path / "x.jsonl", [several, {"caption": "A car.", "key": 2}])
    found = counted(file)
    assert (found.images, found.captions, found.total, found.average) == (2, 3, 3, 1.5)
    assert counted(file, kind=("caption", "short")).total == 4
    with pytest.raises(UserError, match="no caption of kind 'capton' .did you mean 'caption'"):
        counted(file, kind=("capton",))


# ---- where captions lie ----


def test_every_form_of_a_caption_file_gives_the_same_counts(by_hand, tmp_path):
    rows = [{"file_name": f"{key}.jpg", "caption": text} for key, text in BY_HAND.items()]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "hand.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "hand.csv")
    texts = tmp_path / "texts" / "deep"
    texts.mkdir(parents=True)
    for key, text in BY_HAND.items():
        (texts / f"{key}.txt").write_text(text)
    (texts / "a.dense.txt").write_text("An elephant.")  # another kind of a
    pictures = written_captions.folder(tmp_path / "pictures", [0] * 5)
    for file, text in zip(sorted(pictures.glob("*.txt")), BY_HAND.values(), strict=True):
        file.write_text(text)
    first = counted(by_hand)
    for what in ("hand.csv", "hand.parquet", "texts", "pictures", f"folder:{pictures}"):
        faults = BadRecords()
        found = counted(tmp_path / what if ":" not in what else what, faults)
        assert (found.nouns, found.images, found.words) == (first.nouns, 5, first.words), what
        assert not len(faults) and (":" in what or found.name == what.partition(".")[0])


def test_pictures_are_not_read_for_their_captions(tmp_path, monkeypatch):
    folder = written_captions.folder(tmp_path / "pictures", [0] * 3)
    with tarfile.open(tmp_path / "a.tar", "w") as out:
        for file in sorted(folder.iterdir()):
            out.add(file, file.name)
    monkeypatch.setattr(WebdatasetSource, "_sample", None)
    monkeypatch.setattr(FolderSource, "_sample", None)
    for what in (tmp_path / "a.tar", folder):
        found = counted(what)
        assert found.images == 3 and dict(found.nouns) == {"caption": 3}


def test_captions_are_read_out_of_a_tensorflow_dataset(monkeypatch):
    class Captions(tiny_encoders.Noise):
        def captions_at(self, index):
            return self[index].key, self[index].captions

    monkeypatch.setattr(texts, "open_source", lambda *args, **kwargs: Captions(20))
    with pytest.raises(UserError, match="several kinds of caption: --kind short or --kind dense"):
        counted("tfds:noise")
    found = counted("tfds:noise", kind=("short", "dense"))
    assert found.images == 20 and found.captions == 50


def test_two_processes_count_what_one_counts(tmp_path):
    chance = random.Random(5)
    words = ["dog", "cat", "house", *(f"thing{i}a" for i in range(200))]
    texts = [f"A {chance.choice(words)} near the {chance.choice(words)}." for _ in range(900)]
    rows = [{"key": f"k{n}", "caption": text} for n, text in enumerate(texts)]
    file = jsonl(tmp_path / "x.jsonl", rows)
    one, two = (counted(file, workers=n) for n in (1, 2))
    assert one == dataclasses.replace(two, faults=one.faults)
    assert one.total == 1800 and one.images == 900


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
    jsonl(file, rows)
    with open(file, "a") as more:
        more.write('no json\n[1]\n{"key": "cut", "caption": "A tr')
    faults = BadRecords()
    found = counted(file, faults)
    assert dict(found.nouns) == {"dog": 1, "cat": 1, "car": 1}
    assert found.images == 3 and found.too_long == 1
    assert faults.counts == {"missing caption": 3, "key twice": 1, "unreadable row": 3}
    assert faults.repaired == {"control characters": 1, "caption too long": 1}
    assert faults.report(found.images).startswith("10 read: 3 used, 7 left out: 3 unreadable row")
    named = "\n".join(map(str, faults))
    for place in ("2", "3 (silent)", "4 (null)", "5 (a): key twice", "6", "8", "9", "10"):
        assert f"bad.jsonl, line {place}" in named, named


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
    rows = [{"key": "a", "caption": "A dog."}, row, {"key": "c", "caption": "A car."}]
    file = jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError, match=f"bad.jsonl, line 2.*{kind}.*without --strict"):
        counted(file, BadRecords(strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "captions"),
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("nowhere", "unknown source 'nowhere'"),
        ("empty", "holds no .txt"),
        ("x.jsonl --tagger textblop", "did you mean 'textblob'"),
        ("x.jsonl --names a,b", "--names has 2 names, and 1 sets"),
        ("x.jsonl --threshold -1", "threshold -1"),
        ("x.jsonl --tokenizer nowhere", "no tokenizer in nowhere"),
        ("x.jsonl --threshhold 3", "--threshold"),
        ("none.jsonl", "holds no caption .1 left out: 1 missing caption"),
        ("picture.png", "a caption file is one of"),
        ("cut.parquet", "not a complete Parquet file"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    jsonl(tmp_path / "x.jsonl", [{"key": "a", "caption": "A dog."}])
    jsonl(tmp_path / "none.jsonl", [{"key": "a", "caption": ""}])
    with pytest.raises(UserError, match=message) as caught:
        nouns_command.main([*arguments.split(), "--out", "out"])
    assert "\n" not in str(caught.value)


def test_nltk_is_asked_a_sentence_at_a_time_and_its_missing_model_is_named(monkeypatch):
    asked: list[list[str]] = []

    def tag(words):
        asked.append(words)
        return [(word, "NN" if word == "dog" else "DT") for word in words]

    def missing(words):
        raise LookupError("averaged_perceptron_tagger_eng")

    monkeypatch.setattr(nltk, "pos_tag", tag)
    assert nouns.noun_finder("nltk")("A dog. It isn't a dog!") == (["dog", "dog"], 0)
    assert asked[1:] == [["A", "dog", "."], ["It", "is", "n't", "a", "dog", "!"]]
    monkeypatch.setattr(nltk, "pos_tag", missing)
    with pytest.raises(UserError, match="nltk.downloader averaged_perceptron_tagger_eng, or --tag"):
        nouns.noun_finder("nltk")


# ---- what is written ----


def test_two_sets_side_by_side_as_table_json_and_charts(by_hand, tmp_path, capsys):
    save_tokenizer(tiny_encoders.words(), tmp_path / "tokenizer")
    rows = [{"key": "a", "caption": "A car, a car."}, {"key": "a", "caption": "A bus."}]
    other = jsonl(tmp_path / "other $x$.jsonl", rows)
    out = tmp_path / "out"
    flags = ["--threshold", "1", "--paper", "--tokenizer", str(tmp_path / "tokenizer")]
    assert nouns_command.main([str(by_hand), str(other), "--out", str(out), *flags]) == 0
    printed = capsys.readouterr().out
    table = [line.split() for line in printed.splitlines()]
    assert "hand 5 5 2 9 22.2% 12 2.4 8.4".split() in table
    assert "LAION-LLaVA (paper) 85K 646K 13.3% 233.9M 20.9".split() in table
    assert "1 key twice" in printed and "line 2 (a): key twice" in printed and str(out) in printed
    figures = json.loads((out / "nouns.json").read_text())
    tagger = figures["tagger"]
    assert tagger["name"] == "textblob" and tagger["version"]
    assert tagger["tags"] == ["NN", "NNS", "NNP", "NNPS"]
    hand, cars = figures["sets"]
    assert (hand["VN"], hand["DN"], hand["total_nouns"], hand["average"]) == (2, 9, 12, 2.4)
    assert hand["words"] == {"mean": 8.4, "median": 9, "p95": 10, "longest": 10}
    assert cars["top"] == [["car", 2]] and cars["left_out"] == {"key twice": 1}
    assert cars["tokens"]["longest"] > 0
    stem = "other--x-"
    charts = ["side_by_side", "caption_words", "caption_tokens", "hand.top_nouns"]
    for name in (*charts, f"{stem}.top_nouns"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert (out / "hand.dropped_nouns.txt").read_text().splitlines()[0] == "beach\t1"
    assert json.loads((out / f"{stem}.faults.jsonl").read_text())["kind"] == "key twice"


def test_the_papers_ratios_are_as_it_prints_them():
    for valid, distinct, ratio, _, _ in nouns_command.PAPER.values():
        assert 100 * valid / distinct == pytest.approx(ratio, abs=0.2)


def test_a_second_set_of_the_same_name_gets_a_number(by_hand, tmp_path):
    out = tmp_path / "out"
    assert nouns_command.main([str(by_hand)] * 2 + ["--out", str(out), "--workers", "1"]) == 0
    sets = json.loads((out / "nouns.json").read_text())["sets"]
    assert [one["name"] for one in sets] == ["hand", "hand-2"]

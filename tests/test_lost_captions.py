"""What cleaning removes of a prompt or a caption is said, and a text of which nothing is left is
never the empty prompt without a word."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest

from pixart_jax import Pipeline, cli
from pixart_jax.captioning import inspect
from pixart_jax.commands import sample
from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.encoding import prompts
from pixart_jax.encoding.encode import FAULTS, encode_dataset
from pixart_jax.encoding.options import EncodeOptions
from pixart_jax.errors import Notice, UserError
from pixart_jax.text import EMPTIED, HALVED, caption_cleaner, clean_caption, cleaning_loss
from tests.encoding import tiny_encoders as tiny

LOSSES = [
    ("一只猫", EMPTIED),
    ("https://example.com/cats", EMPTIED),
    ("https://example.com/cats.png", HALVED),
    ("IMG_0123.jpg", EMPTIED),
    ("DSC00123", EMPTIED),
    ("1920x1080", EMPTIED),
    ("#123", EMPTIED),
    ("<lora:detail:1>", EMPTIED),
    ("***", EMPTIED),
    ("@somebody", EMPTIED),
    ("<b></b>", EMPTIED),
    ("DSC00123 dog", HALVED),
    ("一只大红色的猫 cat", HALVED),
    ("a cat https://example.com/pictures/of/cats", HALVED),
    ("free shipping worldwide cat", HALVED),
    ("a red circle", None),
    ("A RED  circle!", None),
    ("un chat noir, très grand", None),
    ("a large red circle at #12", None),
    ("", None),
    (" \t\n", None),
]


@pytest.mark.parametrize(("text", "loss"), LOSSES)
def test_what_cleaning_removes(text, loss):
    assert cleaning_loss(text, clean_caption(text)) == loss
    assert cleaning_loss(text, caption_cleaner(False)(text)) is None


@pytest.fixture(scope="module")
def pipe(tiny_model):
    return Pipeline.from_pretrained(tiny_model)


def notices(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if one.category is Notice]


@pytest.mark.parametrize(
    ("prompt", "negative", "options", "said"),
    [
        ("一只猫", "", {}, ["a prompt is empty after cleaning: '一只猫' → ''"]),
        ("a cat", "DSC00123", {}, ["a negative prompt is empty after cleaning: 'DSC00123' → ''"]),
        ("DSC00123 dog", "", {}, ["a prompt is at least half lost in cleaning: 'DSC00123 dog'"]),
        ("a cat", "DSC00123", {"guidance": 1.0}, []),
        ("一只猫", "", {"clean_caption": False}, []),
        ("", " ", {}, []),
    ],
)
def test_sampling_gives_notice(pipe, prompt, negative, options, said):
    found = notices(lambda: pipe(prompt, negative_prompt=negative, steps=1, **options))
    assert len(found) == len(said)
    for message, start in zip(found, said):
        assert message.startswith(start) and "--no-clean-caption" in message


def test_many_lost_prompts_are_one_notice(pipe):
    (message,) = notices(lambda: pipe.encode_prompts([f"DSC0012{n}" for n in range(9)]))
    assert message.startswith("9 prompts are empty after cleaning: 'DSC00120' → ''; ")
    assert notices(lambda: pipe.encode_text(["#123"]))


def test_sample_and_encode_prompts_print_it(tiny_model, tmp_path, capsys):
    (tmp_path / "p.csv").write_text("prompt,negative_prompt\na cat,#123\n一只猫,\n", "utf-8")
    argv = ["--model", str(tiny_model), "--prompts", str(tmp_path / "p.csv"), "--out"]
    assert cli.run(sample.main, [*argv, str(tmp_path / "o"), "--steps", "1"]) == 0
    err = capsys.readouterr().err
    assert "warning: a prompt is empty" in err and "warning: a negative prompt is empty" in err
    from pixart_jax.encoding.command import main

    assert cli.run(main, [*argv, str(tmp_path / "s.safetensors")]) == 0
    assert "warning: 2 prompts are empty" in capsys.readouterr().err
    assert prompts.PART


class Captioned(tiny.Noise):
    """Noise with these short captions, sample by sample."""

    def __init__(self, captions):
        super().__init__(len(captions), name=f"captioned {captions}")
        self._captions, self.faults = captions, BadRecords()

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return dataclasses.replace(sample, captions={"short": tuple(self._captions[index])})


CAPTIONS = [["a red circle"], ["一只猫"], ["#123", "a blue square"], ["DSC00123 dog"], [" "]]
OPTIONS = EncodeOptions(((32, 32),), ("short",), 24, batch_size=4, shard_size=8)


def encode(source, folder, **changes):
    parts = {"vae": tiny.vae(), "text_encoder": tiny.text_encoder(), "tokenizer": tiny.words()}
    options = dataclasses.replace(OPTIONS, **changes.pop("options", {}))
    return encode_dataset(source, options, folder=folder, progress=False, **{**parts, **changes})


def test_encode_counts_an_emptied_caption_as_missing_and_a_halved_one(tmp_path):
    folder = encode(Captioned(CAPTIONS), tmp_path / "set")
    faults = [json.loads(line) for line in (folder / FAULTS).read_text("utf-8").splitlines()]
    assert [(one["kind"], one["mended"]) for one in faults] == [
        ("missing caption", False),
        ("missing caption", False),
        ("caption empty after cleaning", True),
        ("caption at least half lost in cleaning", True),
    ]
    assert "一只猫" in faults[0]["detail"] and EMPTIED in faults[0]["detail"]
    stored = records.Records(folder)
    kept = [records.decode_record(stored.bytes(n), ())[1]["captions.short"] for n in range(3)]
    assert list(map(json.loads, kept)) == [["a red circle"], ["a blue square"], ["DSC00123 dog"]]
    with pytest.raises(UserError, match="missing caption"):
        encode(Captioned(CAPTIONS), tmp_path / "strict", options={"strict": True})


@pytest.mark.parametrize("captions", [[["一只猫"]], [["#123"], [" "], []]])
def test_encode_without_a_record_is_an_error(tmp_path, captions):
    for _ in range(2):  # also where an earlier run has finished
        with pytest.raises(UserError, match="holds no record: . left out: . missing caption"):
            encode(Captioned(captions), tmp_path / "set")


def test_inspect_counts_both():
    options = inspect.InspectOptions(buckets=((32, 32),), duplicates=-1)
    found = inspect.survey(Captioned(CAPTIONS), options, progress=False).figures["captions"]
    assert (found["short"]["emptied"], found["short"]["halved"], found["short"]["empty"]) == (
        2,
        1,
        1,
    )


# ---- numbers that are not finite ----


class _Broken:
    """An encoder whose results of bright pictures, or of long texts, are not finite."""

    def __init__(self, inner, row=0):
        self._inner = inner
        self.params = inner.params

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def encode(self, images):
        mean, std = (np.array(part) for part in self._inner.encode(images))
        std[1] = np.inf
        return mean, std

    def apply(self, ids, lengths):
        states = np.array(self._inner.apply(ids, lengths))
        states[1, 0] = 3.4e38  # finite, but not as bfloat16
        return states


@pytest.mark.parametrize(("part", "name"), [("vae", "std"), ("text_encoder", "text.short.0")])
def test_encode_leaves_out_what_is_not_finite_by_its_key(tmp_path, part, name):
    source = Captioned([["a red circle"], ["a blue square"], ["a green square"]])
    broken = {part: _Broken(getattr(tiny, part)())}
    manifest = records.Manifest.read(encode(source, tmp_path / "set", **broken))
    assert manifest.samples == 2
    assert manifest.skipped == [("noise-00001", f"not finite (NaN or infinity): {name}")]
    with pytest.raises(UserError, match="noise-00001: not finite"):
        encode(source, tmp_path / "strict", options={"strict": True}, **broken)

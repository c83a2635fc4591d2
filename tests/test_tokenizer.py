"""Prompts become the ids that the text encoder was trained on, from either form in which tokenizers
are released."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer

from configs.shapes_text import IDENTIFIERS
from pixart_jax.data.shapes import LEVELS, captions, scene_at
from pixart_jax.errors import UserError
from pixart_jax.pipeline.encoder_identity import tokenizer_identity
from pixart_jax.text import clean_caption, load_tokenizer, save_tokenizer, tokenize, word_tokenizer

WORDS = ["a", "red", "circle", "left", "of", "the", "star"]


def test_a_saved_tokenizer_does_not_remember_how_its_last_call_cut(tmp_path):
    made = word_tokenizer(WORDS)
    with pytest.warns(UserWarning, match="cut to 4"):
        tokenize(made, ["a red circle on a white ground"], 4)
    save_tokenizer(made, tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None
    assert "max_length" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_words_are_one_token_and_others_are_spelled():
    made = word_tokenizer(WORDS)
    pieces = made.convert_ids_to_tokens(made("a red circle").input_ids)
    assert pieces == ["▁a", "▁red", "▁circle", "</s>"]
    assert made.unk_token_id not in made("zebra, 9").input_ids


def test_case_and_blanks_do_not_matter_and_padding_is_a_multiple_of_8():
    ids, lengths = tokenize(word_tokenizer(WORDS), ["  A Red CIRCLE ", "a red circle", ""], 120)
    assert ids.shape == (3, 8) and ids.dtype == lengths.dtype == np.int32
    np.testing.assert_array_equal(ids[0], ids[1])
    assert lengths.tolist() == [4, 4, 1] and ids[2, 0] == 1 and not ids[2, 1:].any()


def test_length_never_exceeds_the_models():
    made = word_tokenizer(WORDS)
    ids, lengths = tokenize(made, ["a " * 9], 11)
    assert ids.shape == (1, 11) and lengths[0] == 10
    says = "21 tokens and was cut to 11, .*lost are its last 10 tokens, 10 words"
    with pytest.warns(UserWarning, match=says):
        ids, lengths = tokenize(made, ["a " * 20], 11)
    assert ids.shape == (1, 11) and lengths[0] == 11 and ids[0, -1] == made.eos_token_id


def test_a_saved_tokenizer_opens_without_transformers_and_does_the_same(root):
    folder = root / "assets" / "shapes" / "tokenizer"
    code = "import sys; from pixart_jax.text import load_tokenizer; load_tokenizer(sys.argv[1])\n"
    code += "assert not {'transformers', 'torch', 'jax'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, folder], check=True)
    opened, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(str(folder))
    pick = random.Random(0)
    texts = ["", " ", "a  red\nstar", "</s> x <pad>", "é 画 \u2028", "a large red star, " * 20]
    texts += ["".join(pick.choices("abz <>/s▁,;Ä画\n\t", k=20)) for _ in range(300)]
    for limit in (4, 11, 120):
        cut = {"truncation": True, "max_length": limit}
        assert opened(texts, **cut)["input_ids"] == reference(texts, **cut)["input_ids"]
    for text in texts:
        ids = opened(text)["input_ids"]
        assert opened.decode(ids, skip_special_tokens=True) == reference.decode(
            ids, skip_special_tokens=True
        )
    for name in ("pad", "eos", "unk", "mask"):
        name = f"{name}_token_id"
        assert getattr(opened, name) == getattr(reference, name)
    assert len(opened) == len(reference)
    assert tokenizer_identity(opened) == tokenizer_identity(reference)


@pytest.mark.parametrize("word", IDENTIFIERS)
def test_a_spare_word_of_the_shipped_tokenizer_is_one_piece_that_no_caption_holds(root, word):
    """A name for what an adapter will learn: it survives the cleaning of prompts."""
    tokenizer = load_tokenizer(root / "assets" / "shapes" / "tokenizer")
    plain, named = (
        tokenizer(clean_caption(text))["input_ids"]
        for text in ("a large red circle", f"a large red {word} circle")
    )
    assert len(named) == len(plain) + 1 and tokenizer.decode(named[3:4]) == word
    for level in LEVELS:
        for index in range(40):
            assert word not in " ".join(captions(scene_at(level, "train", index)).values())


def test_saved_words_open_again(tmp_path):
    made = word_tokenizer(WORDS)
    save_tokenizer(made, tmp_path / "first")
    opened = load_tokenizer(tmp_path / "first")
    save_tokenizer(opened, tmp_path / "second")
    again = AutoTokenizer.from_pretrained(str(tmp_path / "second"))
    assert type(again).__name__ == "T5Tokenizer"
    ids = made("a star, 7")["input_ids"]
    assert opened("a star, 7")["input_ids"] == again("a star, 7")["input_ids"] == ids


def test_a_spiece_model_alone_opens_and_gives_sentencepieces_ids(tmp_path):
    """The form of T5's released tokenizers: no tokenizer.json."""
    text = "a large red circle left of a small blue star\ntwo green squares above the yellow ring\n"
    (tmp_path / "text").write_text(text * 30)
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    how = {"vocab_size": 36, "model_type": "unigram", "minloglevel": 2, "hard_vocab_limit": False}
    files = {"input": str(tmp_path / "text"), "model_prefix": str(folder / "spiece")}
    sentencepiece.SentencePieceTrainer.train(**files, **ids, **how)
    config = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100}
    config["additional_special_tokens"] = [f"<extra_id_{i}>" for i in range(100)]
    config |= {"tokenizer_class": "T5Tokenizer", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    reference = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    texts = ["a red circle", "two yellow rings", "star"]
    ids, lengths = tokenize(load_tokenizer(folder), texts, 120)
    for text, row, length in zip(texts, ids, lengths, strict=True):
        assert row[:length].tolist() == [*reference.encode(text), 1]


def test_a_folder_without_tokenizer_is_named(tmp_path):
    for folder, says in ((tmp_path / "absent", "does not exist"), (tmp_path, "no tokenizer in")):
        with pytest.raises(UserError, match=says):
            load_tokenizer(folder)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe{", b'{"model": 1}', b"cut"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_named_or_opens(tmp_path, data, name):
    save_tokenizer(word_tokenizer(WORDS), tmp_path)
    (tmp_path / name).write_bytes(data)
    try:
        assert load_tokenizer(tmp_path)("a red circle")["input_ids"]
    except UserError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)

import numpy as np
import pytest

from pixart_jax.data.sources import strings
from pixart_jax.data.sources.strings import StringIndex, StringTable


@pytest.mark.parametrize("in_memory", [2**28, 50])
def test_texts_come_back_by_number_from_memory_and_from_the_file(monkeypatch, in_memory):
    monkeypatch.setattr(strings, "_IN_MEMORY", in_memory)
    expected = ["", "a", "ä" * 30, "b/c", "a", *(f"key {i}" for i in range(200)), "b/c"]
    texts = StringTable(expected)
    assert (
        len(texts) == len(expected)
        and list(texts) == expected
        and texts[2] == "ä" * 30
        and (texts._file is None) == (in_memory > 50)
    )
    numbers = StringIndex(texts)
    assert [numbers.find(text) for text in ("", "a", "b/c", "key 7", "nowhere")] == [
        0,
        1,
        3,
        12,
        -1,
    ]
    assert np.flatnonzero(numbers.repeats()).tolist() == [4, len(expected) - 1]


def test_texts_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(strings, "_hash", lambda text: len(text) % 2)
    numbers = StringIndex(StringTable(["aa", "bb", "c", "aa", "d", "bb", "eeee"]))
    assert [numbers.find(text) for text in ("aa", "bb", "c", "d", "eeee", "x", "yy")] == [
        0,
        1,
        2,
        4,
        6,
        -1,
        -1,
    ]
    assert np.flatnonzero(numbers.repeats()).tolist() == [3, 5]


def test_no_texts_at_all():
    numbers = StringIndex(StringTable())
    assert numbers.find("a") == -1 and numbers.repeats().tolist() == []

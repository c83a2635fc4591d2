"""Which words of a text are nouns, by one of two part-of-speech taggers. Counts depend on the
tagger, so it is named in the results."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pixart_jax.errors import UserError, nearest

TAGS = ("NN", "NNS", "NNP", "NNPS")
"""The Penn Treebank's nouns: common and proper, singular and plural."""

LONGEST = 64
"""Characters of a noun; a longer word is an address, a hash or base64, and would fill the table."""

RULE = (
    f"tagged {', '.join(TAGS)}; lower-cased; of two letters or more; at most {LONGEST} characters"
)

_LETTERS = re.compile(r"[^\W\d_].*[^\W\d_]", re.DOTALL)
# TextBlob tokenizes "isn't" as is, n, ', t; split like this before, no piece is a noun.
_NOT = re.compile(r"n['’]t\b", re.IGNORECASE)
_SHORT = re.compile(r"(?<=\w)['’](?:s|d|m|ll|re|ve)\b", re.IGNORECASE)
_SENTENCES = re.compile(r"(?<=[.!?])\s+")

Tag = Callable[[str], Iterable[tuple[str, str]]]  # text → (word, tag) pairs


class Tagger(NamedTuple):
    """nouns: a text → (its nouns in order, lower-cased; how many words were too long). name,
    version: of the package; model: of its tags."""

    name: str
    version: str
    model: str
    nouns: Callable[[str], tuple[list[str], int]]


def open_tagger(name: str = "textblob", singular: bool = False) -> Tagger:
    """Open 'textblob' (its model lies in its wheel) or 'nltk'. singular: plural nouns (NNS, NNPS)
    as their singular, by TextBlob's rules. Raises UserError where NLTK's model is missing."""
    openers = {"textblob": _textblob, "nltk": _nltk}
    if name not in openers:
        raise UserError(f"unknown tagger {name!r}{nearest(name, openers)}")
    tag, model = openers[name]()
    if singular:
        from textblob.en.inflect import singularize

        to_singular = functools.lru_cache(100_000)(singularize)

    def nouns(text: str) -> tuple[list[str], int]:
        found, too_long = [], 0
        for word, mark in tag(text):
            if mark not in TAGS or not _LETTERS.search(word):
                continue
            if len(word) > LONGEST:
                too_long += 1
                continue
            plural = singular and mark.endswith("S")
            found.append(to_singular(word.lower()) if plural else word.lower())
        return found, too_long

    return Tagger(name, importlib.metadata.version(name), model, nouns)


def _textblob() -> tuple[Tag, str]:
    from textblob.en import tag

    def tagged(text: str):
        return tag(_SHORT.sub(" ", _NOT.sub(" not", text)))

    return tagged, "pattern.en, in TextBlob's wheel"


def _nltk() -> tuple[Tag, str]:
    import nltk  # comes with textblob
    from nltk.tokenize import NLTKWordTokenizer

    model = "averaged_perceptron_tagger_eng"
    try:
        nltk.pos_tag(["dog"])
    except LookupError:
        raise UserError(
            f"--tagger nltk: its model is not here: python -m nltk.downloader {model}, or --tagger "
            "textblob"
        ) from None
    split = NLTKWordTokenizer().tokenize

    def tagged(text: str):
        for sentence in _SENTENCES.split(text):
            yield from nltk.pos_tag(split(sentence))

    return tagged, model

"""Which words of a text are nouns, by one of three part-of-speech taggers. Counts depend on the
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
    """Open 'textblob' (its model lies in its wheel), 'nltk', 'spacy' or 'spacy:MODEL'. singular:
    plural nouns (NNS, NNPS) as their singular, by TextBlob's rules. Raises UserError where a
    package or its model is not installed."""
    kind, _, model = name.partition(":")
    openers = {"textblob": _textblob, "nltk": _nltk, "spacy": _spacy}
    if kind not in openers or (model and kind != "spacy"):
        raise UserError(f"unknown tagger {name!r}{nearest(kind, openers)}")
    tag, model = openers[kind](model)
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

    return Tagger(kind, importlib.metadata.version(kind), model, nouns)


def _textblob(_: str) -> tuple[Tag, str]:
    from textblob.en import tag

    def tagged(text: str):
        return tag(_SHORT.sub(" ", _NOT.sub(" not", text)))

    return tagged, "pattern.en, in TextBlob's wheel"


def _nltk(_: str) -> tuple[Tag, str]:
    model = "averaged_perceptron_tagger_eng"
    try:
        import nltk
        from nltk.tokenize import NLTKWordTokenizer

        nltk.pos_tag(["dog"])
    except (ImportError, LookupError):
        raise _missing("nltk", f"pip install nltk; python -m nltk.downloader {model}") from None
    split = NLTKWordTokenizer().tokenize

    def tagged(text: str):
        for sentence in _SENTENCES.split(text):
            yield from nltk.pos_tag(split(sentence))

    return tagged, model


def _spacy(model: str) -> tuple[Tag, str]:
    model = model or "en_core_web_sm"
    try:
        import spacy

        parse = spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError):
        raise _missing("spacy", f"pip install spacy; python -m spacy download {model}") from None

    def tagged(text: str):
        return [(token.text, token.tag_) for token in parse(text)]

    return tagged, f"{model} {parse.meta.get('version', '')}".strip()


def _missing(name: str, install: str) -> UserError:
    return UserError(
        f"--tagger {name}: it or its model is not here: {install}, or --tagger textblob"
    )

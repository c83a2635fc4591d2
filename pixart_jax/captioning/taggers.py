"""Which words of a text are nouns, by one of two part-of-speech taggers. Counts depend on the
tagger, so the results name it."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Callable, Iterable

from pixart_jax.errors import UserError, nearest

TAGS = ("NN", "NNS", "NNP", "NNPS")
"""The Penn Treebank's nouns: common and proper, singular and plural."""
LONGEST = 64
"""Characters of a noun; a longer word is an address, a hash or base64, and would fill the table."""
RULE = (
    f"tagged {', '.join(TAGS)}; lower-cased; of two letters or more; at most {LONGEST} characters"
)
MODELS = {"textblob": "pattern.en, in TextBlob's wheel", "nltk": "averaged_perceptron_tagger_eng"}

_LETTERS = re.compile(r"[^\W\d_].*[^\W\d_]", re.DOTALL)
# TextBlob tokenizes "isn't" as is, n, ', t; split like this before, no piece is a noun.
_NOT = re.compile(r"n['’]t\b", re.IGNORECASE)
_SHORT = re.compile(r"(?<=\w)['’](?:s|d|m|ll|re|ve)\b", re.IGNORECASE)
_SENTENCES = re.compile(r"(?<=[.!?])\s+")

NounFinder = Callable[[str], tuple[list[str], int]]
"""A text → (its nouns in order, lower-cased; how many words were too long)."""


def noun_finder(name: str = "textblob", singular: bool = False) -> NounFinder:
    """Open a tagger of MODELS. singular: plural nouns (NNS, NNPS) become their singular, by
    TextBlob's rules. Raises UserError for an unknown name, or where NLTK's model is missing."""
    if name not in MODELS:
        raise UserError(f"unknown tagger {name!r}{nearest(name, MODELS)}")
    from textblob.en import tag
    from textblob.en.inflect import singularize

    to_singular = functools.lru_cache(100_000)(singularize)
    nltk_tag = _nltk() if name == "nltk" else None

    def nouns(text: str) -> tuple[list[str], int]:
        found, too_long = [], 0
        tagged = nltk_tag(text) if nltk_tag else tag(_SHORT.sub(" ", _NOT.sub(" not", text)))
        for word, mark in tagged:
            if mark not in TAGS or not _LETTERS.search(word):
                continue
            if len(word) > LONGEST:
                too_long += 1
            else:
                plural = singular and mark.endswith("S")
                found.append(to_singular(word.lower()) if plural else word.lower())
        return found, too_long

    return nouns


def _nltk() -> Callable[[str], Iterable[tuple[str, str]]]:
    import nltk  # comes with textblob
    from nltk.tokenize import NLTKWordTokenizer

    try:
        nltk.pos_tag(["dog"])
    except LookupError:
        raise UserError(
            f"--tagger nltk: its model is not here: python -m nltk.downloader {MODELS['nltk']}, or "
            "--tagger textblob"
        ) from None
    split = NLTKWordTokenizer().tokenize
    return lambda text: (pair for s in _SENTENCES.split(text) for pair in nltk.pos_tag(split(s)))


def description(name: str) -> dict:
    """The tagger in nouns.json."""
    version = importlib.metadata.version(name)
    return {"name": name, "version": version, "model": MODELS[name], "tags": list(TAGS)}

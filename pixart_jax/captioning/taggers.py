"""Which words of a text are nouns: three part-of-speech taggers under one face. What a count says
depends on its tagger, so it is named."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Callable

from pixart_jax.errors import UserError, nearest

TAGS = ("NN", "NNS", "NNP", "NNPS")
"""The Penn Treebank's nouns: common and proper, singular and plural."""

LONGEST = 64
"""Characters of a noun; what is longer is no word (an address, a hash, base64), and would fill the
table."""

RULE = (
    f"tagged {', '.join(TAGS)}; lower-cased; of two letters or more; at most {LONGEST} characters"
)

_LETTERS = re.compile(r"[^\W\d_].*[^\W\d_]", re.DOTALL)
# TextBlob's tokens of "isn't" are is, n, ', t; opened before, the pieces are no nouns.
_NOT = re.compile(r"n['’]t\b", re.IGNORECASE)
_SHORT = re.compile(r"(?<=\w)['’](?:s|d|m|ll|re|ve)\b", re.IGNORECASE)
_SENTENCES = re.compile(r"(?<=[.!?])\s+")


@dataclasses.dataclass(frozen=True)
class Tagger:
    """nouns: a text → its nouns in order, lower-cased; the second value counts words that were too
    long to be one. name, version: of the package; model: what it tags by."""

    name: str
    version: str
    model: str
    nouns: Callable[[str], tuple[list[str], int]]


def open_tagger(name: str = "textblob", singular: bool = False) -> Tagger:
    """'textblob' (its model lies in its wheel), 'nltk' or 'spacy', or 'spacy:MODEL'. singular:
    plural nouns (NNS, NNPS) as their singular, by TextBlob's rules. UserError where a package or
    its model is not here."""
    kind, _, model = name.partition(":")
    if kind not in _OPEN or (model and kind != "spacy"):
        raise UserError(f"unknown tagger {name!r}{nearest(kind, _OPEN)}")
    tag, model = _OPEN[kind](model)
    one = _singular() if singular else None

    def nouns(text: str) -> tuple[list[str], int]:
        found, long = [], 0
        for word, mark in tag(text):
            if mark not in TAGS or not _LETTERS.search(word):
                continue
            if len(word) > LONGEST:
                long += 1
                continue
            word = word.lower()
            found.append(one(word) if one and mark.endswith("S") else word)
        return found, long

    return Tagger(kind, importlib.metadata.version(kind), model, nouns)


def _textblob(_: str):
    from textblob.en import tag

    def tagged(text: str):
        return tag(_SHORT.sub(" ", _NOT.sub(" not", text)))

    return tagged, "pattern.en, in TextBlob's wheel"


def _singular() -> Callable[[str], str]:
    import functools

    from textblob.en.inflect import singularize

    return functools.lru_cache(100_000)(singularize)


def _nltk(_: str):
    try:
        import nltk
        from nltk.tokenize import NLTKWordTokenizer

        nltk.pos_tag(["dog"])
    except ImportError:
        raise UserError(
            "--tagger nltk: nltk is not installed: pip install nltk, or --tagger textblob"
        ) from None
    except LookupError:
        raise UserError(
            "--tagger nltk: its model is not here: python -m nltk.downloader "
            "averaged_perceptron_tagger_eng, or --tagger textblob"
        ) from None
    split = NLTKWordTokenizer().tokenize

    def tagged(text: str):
        return [
            pair for sentence in _SENTENCES.split(text) for pair in nltk.pos_tag(split(sentence))
        ]

    return tagged, "averaged_perceptron_tagger_eng"


def _spacy(model: str):
    model = model or "en_core_web_sm"
    try:
        import spacy

        parse = spacy.load(model, exclude=["parser", "ner", "lemmatizer"])
    except ImportError:
        raise UserError(
            "--tagger spacy: spacy is not installed: pip install spacy, or --tagger textblob"
        ) from None
    except OSError:
        raise UserError(
            f"--tagger spacy: its model {model} is not here: python -m spacy download {model}, or "
            "--tagger textblob"
        ) from None

    def tagged(text: str):
        return [(token.text, token.tag_) for token in parse(text)]

    return tagged, f"{model} {parse.meta.get('version', '')}".strip()


_OPEN = {"textblob": _textblob, "nltk": _nltk, "spacy": _spacy}

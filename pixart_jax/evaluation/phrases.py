"""Words and noun phrases of prompts, by which T2I-CompBench asks its questions.

The benchmark uses spaCy's en_core_web_sm, and its scores depend on the parser. So a table of the
phrases can be made once, with any parser, and read wherever images are scored; results name the
parser and the table's hash. Without spaCy, TextBlob's tagger and a grammar of noun phrases serve.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from pixart_jax.errors import UserError, one_line
from pixart_jax.files import write_json

TEXTBLOB = "textblob"
MOST = 8  # questions about an image
_PLACES = {"top", "the side", "the left", "the right"}  # noun phrases that name no object
_KINDS = dict.fromkeys(("NN", "NNS"), "NOUN") | dict.fromkeys(("NNP", "NNPS"), "PROPN")
_KINDS |= dict.fromkeys(("JJ", "JJR", "JJS"), "ADJ") | dict.fromkeys(("DT", "PRP$"), "DET")
_KINDS |= dict.fromkeys(("VBN", "VBG"), "VERB") | {"CD": "NUM", "PRP": "PRON", "CC": "CCONJ"}
_KINDS |= {",": "PUNCT", "VB": "BASE", "VBP": "BASE"}
# [D]eterminer, [A]djective or number, [V]erb's participle, [B]ase of a verb, [N]oun, p[R]onoun …
_LETTERS = {"DET": "D", "ADJ": "A", "VERB": "V", "NUM": "A", "NOUN": "N", "PROPN": "N"}
_LETTERS |= {"BASE": "B", "PRON": "R", "CCONJ": "C", "PUNCT": "C"}
_CHUNK = re.compile("D?(?:[AV](?:C+(?=[AV]))?)*N+|R")
# "a key hidden by", "a blue cross": no noun follows the adjectives, so their last word is one
_LAST = re.compile("D[AV]*(?:A(?=V*(?:[^AVBCN]|$))|B)")


@dataclasses.dataclass(frozen=True)
class Phrases:
    """words: (text, universal part of speech). chunks: the noun phrases, at most MOST."""

    words: tuple[tuple[str, str], ...]
    chunks: tuple[str, ...]

    @property
    def nouns(self) -> list[str]:
        return [text for text, kind in self.words if kind == "NOUN"]

    @property
    def without_adjectives(self) -> str:
        return " ".join(text for text, kind in self.words if kind != "ADJ")


@dataclasses.dataclass(frozen=True)
class Phrasebook:
    """The phrases of prompts. name: of the parser. look_up: prompt → its phrases. sha256: of the
    table, None without one."""

    name: str
    look_up: Callable[[str], Phrases]
    sha256: str | None = None

    def __getitem__(self, prompt: str) -> Phrases:
        return self.look_up(prompt)

    @property
    def facts(self) -> dict[str, str | None]:
        return {"parser": self.name, "sha256": self.sha256}

    @classmethod
    def by(cls, tagger: str = TEXTBLOB) -> Phrasebook:
        """By a parser: TEXTBLOB, or name or folder of a spaCy model. Raises UserError where it is
        not installed."""
        name, parse = _textblob() if tagger == TEXTBLOB else _spacy(tagger)
        return cls(name, functools.cache(parse))

    @classmethod
    def read(cls, path: Path) -> Phrasebook:
        """A table that :meth:`write` wrote. Raises UserError for any other file; a prompt that it
        does not hold is an error when it is looked up."""
        try:
            data = path.read_bytes()
            table = json.loads(data)
            name = str(table["tagger"])
            found = {
                prompt: Phrases(tuple((w, k) for w, k in row["words"]), tuple(row["chunks"]))
                for prompt, row in table["prompts"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a table of phrases: {one_line(error)}") from None

        def look_up(prompt: str) -> Phrases:
            if prompt not in found:
                raise UserError(f"{path} holds no phrases of {prompt!r}: make it again")
            return found[prompt]

        return cls(name, look_up, sha256(data).hexdigest())

    def write(self, path: Path, prompts: Iterable[str]) -> str:
        """Write a table of prompts; return its SHA-256."""
        rows = {prompt: dataclasses.asdict(self[prompt]) for prompt in prompts}
        write_json(path, {"tagger": self.name, "prompts": rows}, indent=1, ensure_ascii=False)
        return sha256(path.read_bytes()).hexdigest()


def _spacy(model: str) -> tuple[str, Callable[[str], Phrases]]:
    try:
        import spacy

        pipeline = spacy.load(model)
    except (ImportError, OSError) as error:
        instead = "install spaCy and its model, or use --tagger textblob"
        raise UserError(f"--tagger {model}: {one_line(error)}; {instead}") from None
    meta = pipeline.meta
    name = f"spacy {spacy.__version__} {meta['lang']}_{meta['name']} {meta['version']}"

    def parse(prompt: str) -> Phrases:
        text = pipeline(prompt)
        words = tuple((token.text, token.pos_) for token in text)
        return Phrases(words, _things(chunk.text for chunk in text.noun_chunks))

    return name, parse


def _textblob() -> tuple[str, Callable[[str], Phrases]]:
    from textblob.en import tag

    def parse(prompt: str) -> Phrases:
        words = tag(prompt)
        kinds = [_KINDS.get(mark, "X") for _, mark in words]
        for match in _LAST.finditer(_spell(kinds)):
            kinds[match.end() - 1] = "NOUN"
        places, end = [], 0
        for word, _ in words:
            start = max(prompt.find(word, end), end)
            places.append((start, end := start + len(word)))
        spans = [match.span() for match in _CHUNK.finditer(_spell(kinds))]
        chunks = _things(prompt[places[a][0] : places[b - 1][1]] for a, b in spans)
        return Phrases(tuple((word, kind) for (word, _), kind in zip(words, kinds)), chunks)

    return f"{TEXTBLOB} {importlib.metadata.version(TEXTBLOB)}", parse


def _spell(kinds: Sequence[str]) -> str:
    return "".join(_LETTERS.get(kind, "x") for kind in kinds)


def _things(chunks: Iterable[str]) -> tuple[str, ...]:
    return tuple(chunk for chunk in chunks if chunk not in _PLACES)[:MOST]

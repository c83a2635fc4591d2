"""The nouns of a set's captions, as the paper's table counts them: valid and distinct nouns, their
total, how many per image.

Captions are read once, in chunks, and processes tag them. Sums do not depend on the order of the
chunks, so the counts do not depend on the number of processes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import itertools
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pixart_jax.captioning.texts import open_captions, texts_of_kinds
from pixart_jax.data.faults import BadRecords
from pixart_jax.encoding.options import NamesFlag
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import hash64
from pixart_jax.text import clean_caption, load_tokenizer

CHUNK = 400  # images per task
TOP, DROPPED = 100, 1000  # nouns that are reported by name
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


@dataclasses.dataclass(frozen=True)
class NounOptions:
    """How nouns are counted."""

    kind: NamesFlag = ()
    """The kind of caption, or several with commas; by default 'caption', or the only one."""
    threshold: int = 10
    """A noun is valid that occurs more often than this."""
    tagger: str = "textblob"
    """textblob (its model comes with it) or nltk (the paper's; where its model is installed)."""
    singular: bool = False
    """Count a plural as its singular; the paper does not."""
    tokenizer: Path | None = None
    """A tokenizer's folder (MODEL/tokenizer): count tokens too, as the text encoder sees them."""
    workers: int = 0
    """Processes that tag; 0 is one per core. The counts do not depend on it."""

    def __post_init__(self):
        for name in ("threshold", "workers"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)}: at least 0")


@dataclasses.dataclass
class ChunkCounts:
    """The counts of some captions. nouns: noun → occurrences; words, tokens: length → captions;
    too_long: words that were too long for a noun."""

    images: int = 0
    captions: int = 0
    too_long: int = 0
    nouns: Counter[str] = dataclasses.field(default_factory=Counter)
    words: Counter[int] = dataclasses.field(default_factory=Counter)
    tokens: Counter[int] = dataclasses.field(default_factory=Counter)

    def add(self, other: ChunkCounts) -> None:
        self.images += other.images
        self.captions += other.captions
        self.too_long += other.too_long
        self.nouns.update(other.nouns)
        self.words.update(other.words)
        self.tokens.update(other.tokens)


@dataclasses.dataclass
class NounCounts(ChunkCounts):
    """The counts of a set. threshold: nouns that occur more often than this are valid."""

    name: str = ""
    threshold: int = 10
    faults: BadRecords = dataclasses.field(default_factory=BadRecords)

    @property
    def distinct(self) -> int:
        """DN."""
        return len(self.nouns)

    @property
    def valid(self) -> int:
        """VN."""
        return sum(times > self.threshold for times in self.nouns.values())

    @property
    def ratio(self) -> float:
        """VN / DN, 0 where there is no noun."""
        return self.valid / max(1, self.distinct)

    @property
    def total(self) -> int:
        return self.nouns.total()

    @property
    def average(self) -> float:
        """Nouns per image."""
        return self.total / max(1, self.images)

    @property
    def dropped_total(self) -> int:
        """Occurrences of the nouns that are not valid."""
        return sum(times for times in self.nouns.values() if times <= self.threshold)

    def top(self) -> list[tuple[str, int]]:
        """The most frequent nouns."""
        return sorted(self.nouns.items(), key=_by_frequency)[:TOP]

    def dropped(self) -> list[tuple[str, int]]:
        """A sample of the nouns that are not valid, the same in every run."""
        rare = [noun for noun, times in self.nouns.items() if times <= self.threshold]
        chosen = sorted(rare, key=hash64)[:DROPPED]
        return sorted(((noun, self.nouns[noun]) for noun in chosen), key=_by_frequency)


def _by_frequency(pair: tuple[str, int]) -> tuple[int, str]:
    return -pair[1], pair[0]


def quantiles(lengths: Counter[int], *shares: float) -> list[int]:
    """For each share the smallest length that at least this share of the texts do not exceed.
    lengths: length → texts, not empty."""
    values = np.repeat(list(lengths), list(lengths.values()))
    return np.quantile(values, shares, method="inverted_cdf").tolist()


def count(
    what: str,
    options: NounOptions,
    faults: BadRecords,
    split: str = "train",
    limit: int | None = None,
) -> NounCounts:
    """Count the nouns of a caption file, a folder of .txt or a source. Raises UserError where it
    cannot be opened or holds no caption."""
    noun_finder(options.tagger)  # raises before the work where it is missing
    name, total, records = open_captions(what, faults, split, limit)
    result = NounCounts(name=name, threshold=options.threshold, faults=faults)
    found = texts_of_kinds(records, options.kind, faults, what)
    with tqdm(total=total, unit=" images", desc=f"nouns of {name}") as bar:
        for part in _count_chunks(found, options):
            result.add(part)
            bar.update(part.images)
    if not result.images:
        reason = f" ({faults.summary()})" if len(faults) else ""
        raise UserError(f"{what} holds no caption{reason}")
    return result


def _count_chunks(found: Iterator[tuple[str, ...]], options: NounOptions) -> Iterator[ChunkCounts]:
    """The counts of every CHUNK images. Reading is at most some chunks per worker ahead."""
    workers = options.workers or os.cpu_count() or 1
    chunks = iter(lambda: list(itertools.islice(found, CHUNK)), [])
    first = list(itertools.islice(chunks, 2))
    if workers == 1 or len(first) < 2:  # starting a process takes as long as tagging 2,000 captions
        _start(options)
        yield from map(_count_chunk, itertools.chain(first, chunks))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (options,))
    try:
        while first:
            tasks = [pool.submit(_count_chunk, chunk) for chunk in first]
            first = list(itertools.islice(chunks, 16 * workers))
            yield from (task.result() for task in tasks)
    except BrokenProcessPool:
        raise UserError(
            "a tagging process was ended from outside (out of memory?): fewer --workers need less"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_nouns: NounFinder  # of a worker process
_tokenizer = None


def _start(options: NounOptions) -> None:
    global _nouns, _tokenizer
    _nouns = noun_finder(options.tagger, options.singular)
    _tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None


def _count_chunk(chunk: Sequence[tuple[str, ...]]) -> ChunkCounts:
    texts = [text for image in chunk for text in image]
    part = ChunkCounts(images=len(chunk), captions=len(texts))
    for text in texts:
        found, too_long = _nouns(text)
        part.nouns.update(found)
        part.too_long += too_long
        part.words[len(text.split())] += 1
    if _tokenizer is not None:
        ids = _tokenizer([clean_caption(text) for text in texts])["input_ids"]
        part.tokens.update(map(len, ids))
    return part


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


def tagger_description(name: str) -> dict:
    """The tagger in nouns.json."""
    version = importlib.metadata.version(name)
    return {"name": name, "version": version, "model": MODELS[name], "tags": list(TAGS)}

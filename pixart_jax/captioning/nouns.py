"""The nouns of a set's captions, as the paper's table counts them: valid and distinct nouns, their
total, how many per image.

Captions are read once, in chunks; processes tag them; one table adds up. Sums do not depend on the
order in which chunks come back, so neither do the counts on the number of processes.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from pixart_jax.captioning import taggers
from pixart_jax.captioning.texts import of_kinds, open_captions
from pixart_jax.data.faults import BadRecords
from pixart_jax.encoding.options import NamesFlag
from pixart_jax.errors import UserError
from pixart_jax.files import hash64
from pixart_jax.text import clean_caption, load_tokenizer

CHUNK = 400  # images per task
CHUNK_TEXT = 1_000_000  # characters per task at most
TOP, DROPPED = 100, 1000  # nouns that are reported by name


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


class Lengths(Counter[int]):
    """How many captions have how many words (or tokens)."""

    def quantile(self, share: float) -> int:
        """The smallest length that at least ``share`` of the captions do not exceed."""
        rest = share * self.total()
        for length in sorted(self):
            rest -= self[length]
            if rest <= 1e-9:
                return length
        return 0

    def mean(self) -> float:
        return sum(length * count for length, count in self.items()) / max(1, self.total())

    def above(self, limit: int) -> int:
        """How many captions are longer than ``limit``."""
        return sum(count for length, count in self.items() if length > limit)


@dataclasses.dataclass
class ChunkCounts:
    """The counts of some captions. nouns: noun → occurrences; too_long: words that were too long
    for a noun."""

    images: int = 0
    captions: int = 0
    too_long: int = 0
    nouns: Counter[str] = dataclasses.field(default_factory=Counter)
    words: Lengths = dataclasses.field(default_factory=Lengths)
    tokens: Lengths = dataclasses.field(default_factory=Lengths)

    def add(self, other: ChunkCounts) -> None:
        self.images += other.images
        self.captions += other.captions
        self.too_long += other.too_long
        self.nouns.update(other.nouns)
        self.words.update(other.words)
        self.tokens.update(other.tokens)


@dataclasses.dataclass
class NounCounts(ChunkCounts):
    """The counts of one set. threshold: nouns that occur more often than this are valid."""

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
        return self.valid / self.distinct if self.distinct else 0.0

    @property
    def total(self) -> int:
        return self.nouns.total()

    @property
    def average(self) -> float:
        """Nouns per image."""
        return self.total / self.images if self.images else 0.0

    @property
    def dropped_total(self) -> int:
        """Occurrences of the nouns that are not valid."""
        return sum(times for times in self.nouns.values() if times <= self.threshold)

    def top(self) -> list[tuple[str, int]]:
        """The most frequent nouns."""
        return sorted(self.nouns.items(), key=lambda item: (-item[1], item[0]))[:TOP]

    def dropped(self) -> list[tuple[str, int]]:
        """A sample of the nouns that are not valid, the same in every run."""
        rare = [noun for noun, times in self.nouns.items() if times <= self.threshold]
        chosen = sorted(rare, key=hash64)[:DROPPED]
        return sorted(((noun, self.nouns[noun]) for noun in chosen), key=lambda p: (-p[1], p[0]))


def count(
    what: str,
    options: NounOptions,
    faults: BadRecords,
    split: str = "train",
    limit: int | None = None,
) -> NounCounts:
    """Count the nouns of a caption file, a folder of .txt or a source. Raises UserError where it
    cannot be opened or holds no caption."""
    taggers.open_tagger(options.tagger, options.singular)  # raises before the work where missing
    found = open_captions(what, faults, split, limit)
    result = NounCounts(name=found.name, threshold=options.threshold, faults=faults)
    chunks = _chunks(_first_of_key(of_kinds(found.records, options.kind, faults, what), faults))
    with tqdm(total=found.total, unit=" images", desc=f"nouns of {found.name}") as bar:
        for part in _count_chunks(chunks, options):
            result.add(part)
            bar.update(part.images)
    if not result.images:
        reason = f" ({faults.summary()})" if len(faults) else ""
        raise UserError(f"{what} holds no caption{reason}")
    return result


def _first_of_key(
    found: Iterable[tuple[str, str, tuple[str, ...]]], faults: BadRecords
) -> Iterator[tuple[str, ...]]:
    """The texts of each key's first record; later ones are named."""
    seen: set[int] = set()
    for key, place, texts in found:
        if key and hash64(key) in seen:
            faults.add(place, "key twice", key)
        else:
            seen.add(hash64(key))
            yield texts


def _chunks(found: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    chunk, size = [], 0
    for texts in found:
        chunk.append(texts)
        size += sum(map(len, texts))
        if len(chunk) == CHUNK or size > CHUNK_TEXT:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _count_chunks(
    chunks: Iterator[Sequence[tuple[str, ...]]], options: NounOptions
) -> Iterator[ChunkCounts]:
    """Every chunk's counts, in any order. At most three chunks per worker wait: reading does not
    run ahead of tagging."""
    workers = options.workers or os.cpu_count() or 1
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    if workers == 1 or len(first) < 2:  # starting a process takes as long as tagging 2,000 captions
        _start(options)
        yield from map(_count_chunk, chunks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (options,))
    try:
        waiting: set[concurrent.futures.Future[ChunkCounts]] = set()
        for chunk in chunks:
            waiting.add(pool.submit(_count_chunk, chunk))
            if len(waiting) >= 3 * workers:
                done, waiting = concurrent.futures.wait(waiting, return_when="FIRST_COMPLETED")
                yield from (future.result() for future in done)
        yield from (future.result() for future in concurrent.futures.as_completed(waiting))
    except BrokenProcessPool:
        raise UserError(
            "a tagging process was ended from outside (out of memory?): fewer --workers need less"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_tagger: taggers.Tagger  # of a worker process
_tokenizer = None


def _start(options: NounOptions) -> None:
    global _tagger, _tokenizer
    _tagger = taggers.open_tagger(options.tagger, options.singular)
    _tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None


def _count_chunk(chunk: Sequence[tuple[str, ...]]) -> ChunkCounts:
    texts = [text for image in chunk for text in image]
    part = ChunkCounts(images=len(chunk), captions=len(texts))
    for text in texts:
        found, too_long = _tagger.nouns(text)
        part.nouns.update(found)
        part.too_long += too_long
        part.words[len(text.split())] += 1
    if _tokenizer is not None:
        ids = _tokenizer([clean_caption(text) for text in texts])["input_ids"]
        part.tokens.update(map(len, ids))
    return part

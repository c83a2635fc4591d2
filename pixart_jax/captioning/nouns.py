"""The nouns of a set's captions, as the paper's table counts them: valid and distinct nouns, their
total, how many an image.

Captions are read once, in chunks; processes tag them; one table adds up. Sums do not depend on the
order in which chunks come back, so the counts are the same whatever the number of processes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import heapq
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from pixart_jax.captioning import taggers
from pixart_jax.captioning.caption_texts import CaptionTexts, of_kinds
from pixart_jax.captioning.noun_table import KeysSeen, NounTable
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError

CHUNK = 400  # pictures a task
CHUNK_TEXT = 1_000_000  # characters a task at most
TOP, DROPPED = 100, 1000  # nouns that are reported by name


@dataclasses.dataclass(frozen=True)
class NounOptions:
    """How nouns are counted. threshold: a noun is valid that occurs more often than this. tagger,
    singular: see taggers.open_tagger.
    tokenizer: a folder, to count tokens too. workers: processes, 0 is one a core. table: nouns that
    are held in memory."""

    threshold: int = 10
    tagger: str = "textblob"
    singular: bool = False
    tokenizer: Path | None = None
    kinds: tuple[str, ...] = ()
    workers: int = 0
    table: int = 4_000_000

    def __post_init__(self):
        for name, least in (("threshold", 0), ("workers", 0), ("table", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: at least {least}")


@dataclasses.dataclass
class Lengths:
    """How many captions have how many words (or tokens)."""

    counts: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def quantile(self, share: float) -> int:
        """The least length that at least ``share`` of the captions do not exceed."""
        rest = share * self.counts.total()
        for length in sorted(self.counts):
            rest -= self.counts[length]
            if rest <= 1e-9:
                return length
        return 0

    def mean(self) -> float:
        return sum(length * count for length, count in self.counts.items()) / max(
            1, self.counts.total()
        )

    def above(self, most: int) -> int:
        """How many captions are longer than ``most``."""
        return sum(count for length, count in self.counts.items() if length > most)

    def summary(self) -> dict:
        return {
            "mean": round(self.mean(), 2),
            "median": self.quantile(0.5),
            "p95": self.quantile(0.95),
            "longest": max(self.counts, default=0),
        }


@dataclasses.dataclass
class NounCounts:
    """What was counted of one set. valid, distinct: VN and DN; total: of all nouns; top: the most
    frequent (noun, count); dropped: a sample of the nouns that occur too seldom to be valid, the
    same whatever the order. dropped_total: how often those occur together."""

    name: str
    images: int = 0
    captions: int = 0
    total: int = 0
    valid: int = 0
    distinct: int = 0
    dropped_total: int = 0
    too_long: int = 0
    top: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    dropped: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    words: Lengths = dataclasses.field(default_factory=Lengths)
    tokens: Lengths | None = None
    spills: int = 0
    faults: BadRecords = dataclasses.field(default_factory=BadRecords)

    @property
    def ratio(self) -> float:
        """VN / DN, 0 where there is no noun."""
        return self.valid / self.distinct if self.distinct else 0.0

    @property
    def average(self) -> float:
        """Nouns an image."""
        return self.total / self.images if self.images else 0.0


def count(
    what: str,
    options: NounOptions,
    faults: BadRecords,
    split: str = "train",
    limit: int | None = None,
) -> NounCounts:
    """Count the nouns of a caption file, a folder of .txt or a source. UserError where it cannot be
    opened or holds no caption."""
    taggers.open_tagger(options.tagger, options.singular)  # that it is there: said once, here
    found = CaptionTexts(what, faults, split, limit)
    result = NounCounts(found.name, faults=faults, tokens=Lengths() if options.tokenizer else None)
    chunks = _chunks(_once(of_kinds(found, options.kinds, faults, what), faults))
    from tqdm import tqdm

    with (
        NounTable(options.table) as table,
        tqdm(
            total=found.total,
            unit=" images",
            desc=f"nouns of {found.name}",
            dynamic_ncols=True,
            mininterval=0.5,
        ) as bar,
    ):
        for nouns, images, captions, too_long, words, tokens in _tagged(chunks, options):
            table.add(nouns)
            result.total += sum(nouns.values())
            result.images += images
            result.captions += captions
            result.too_long += too_long
            result.words.counts.update(words)
            if result.tokens is not None:
                result.tokens.counts.update(tokens)
            bar.update(images)
        if not result.images:
            raise UserError(
                f"{what} holds no caption{f' ({faults.summary()})' if len(faults) else ''}"
            )
        _look_through(table, result, options.threshold)
        result.spills = table.spills
    return result


def _look_through(table: NounTable, result: NounCounts, threshold: int) -> None:
    """One pass over the sorted table."""
    top: list[tuple[int, tuple]] = []
    dropped: list[tuple[int, str, int]] = []
    for noun, times in table:
        result.distinct += 1
        if times > threshold:
            result.valid += 1
        else:
            result.dropped_total += times
            _keep(dropped, (-_shuffled(noun), noun, times), DROPPED)
        _keep(top, (times, _Last(noun)), TOP)
    result.top = [(last.noun, times) for times, last in sorted(top, reverse=True)]
    result.dropped = sorted(
        ((noun, times) for _, noun, times in dropped), key=lambda pair: (-pair[1], pair[0])
    )


def _keep(heap: list, item, most: int) -> None:
    if len(heap) < most:
        heapq.heappush(heap, item)
    elif item > heap[0]:
        heapq.heapreplace(heap, item)


class _Last:
    """A noun that sorts backwards: of two as frequent ones the first in the alphabet is the
    greater."""

    __slots__ = ("noun",)

    def __init__(self, noun: str):
        self.noun = noun

    def __lt__(self, other: _Last) -> bool:
        return self.noun > other.noun


def _shuffled(noun: str) -> int:
    import zlib

    return zlib.crc32(noun.encode("utf-8", "surrogatepass"))


def _once(
    found: Iterable[tuple[str, str, tuple[str, ...]]], faults: BadRecords
) -> Iterator[tuple[str, ...]]:
    """The texts of each key's first record; later ones are named."""
    seen, waiting = KeysSeen(), []

    def checked():
        named = [entry for entry in waiting if entry[0]]
        fresh = iter(seen.new([key for key, _, _ in named]) if named else [])
        for key, place, texts in waiting:
            if key and not next(fresh):
                faults.add(place, "key twice", key)
            else:
                yield texts

    for entry in found:
        waiting.append(entry)
        if len(waiting) == CHUNK:
            yield from checked()
            waiting = []
    yield from checked()


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


Counted = tuple[dict[str, int], int, int, int, dict[int, int], dict[int, int]]
"""Of a chunk: nouns, images, captions, words too long, captions by words, captions by tokens."""


def _tagged(chunks: Iterator[Sequence[tuple[str, ...]]], options: NounOptions) -> Iterator[Counted]:
    """Every chunk's counts, in any order. A few chunks wait for a worker, no more: reading does not
    run ahead of tagging."""
    workers = options.workers or os.cpu_count() or 1
    first = next(chunks, None)
    second = next(chunks, None) if workers > 1 else None
    if second is None:  # a process starts in seconds, and tags two thousand captions in one
        tag = _Tagging(options)
        for chunk in (first, *chunks) if first is not None else ():
            yield tag(chunk)
        return

    def all_of_them():
        yield first
        yield second
        yield from chunks

    # a fork would copy the threads' locks of whatever was imported
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(
            workers, context, initializer=_start, initargs=(options,)
        ) as pool:
            waiting: set[concurrent.futures.Future] = set()
            try:
                for chunk in all_of_them():
                    waiting.add(pool.submit(_tag, chunk))
                    if len(waiting) >= 3 * workers:
                        done, waiting = concurrent.futures.wait(
                            waiting, return_when=concurrent.futures.FIRST_COMPLETED
                        )
                        for future in done:
                            yield future.result()
                for future in concurrent.futures.as_completed(waiting):
                    yield future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    except BrokenProcessPool:
        raise UserError(
            "a tagging process was ended from outside (out of memory?): fewer --workers need less"
        ) from None


class _Tagging:
    """A tagger, and a tokenizer where tokens are counted."""

    def __init__(self, options: NounOptions):
        self._tagger = taggers.open_tagger(options.tagger, options.singular)
        self._tokenizer = None
        if options.tokenizer is not None:
            from pixart_jax.text import load_tokenizer

            self._tokenizer = load_tokenizer(options.tokenizer)

    def __call__(self, chunk: Sequence[tuple[str, ...]]) -> Counted:
        nouns: collections.Counter[str] = collections.Counter()
        words: collections.Counter[int] = collections.Counter()
        tokens: collections.Counter[int] = collections.Counter()
        captions = too_long = 0
        for texts in chunk:
            for text in texts:
                found, long = self._tagger.nouns(text)
                nouns.update(found)
                too_long += long
                captions += 1
                words[len(text.split())] += 1
            if self._tokenizer is not None:
                from pixart_jax.text import clean_caption

                ids = self._tokenizer([clean_caption(text) for text in texts])["input_ids"]
                tokens.update(map(len, ids))
        return dict(nouns), len(chunk), captions, too_long, dict(words), dict(tokens)


_tagging: _Tagging | None = None  # of a worker process


def _start(options: NounOptions) -> None:
    global _tagging
    _tagging = _Tagging(options)


def _tag(chunk: Sequence[tuple[str, ...]]) -> Counted:
    return _tagging(chunk)

"""What a training batch is made of: pictures, token ids, encoded records, features. Each kind knows
its buckets and reads rows.

All have the same face, which the loader relies on: ``bucket_of`` (int [n]: number of each sample's
bucket, −1 where it cannot be used), ``buckets`` ((height, width) by number) and ``read(indices,
bucket, draws) → {name: numpy array}``.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Callable, Container, Sequence
from typing import Protocol

import numpy as np
from tqdm import tqdm

from pixart_jax.data import buckets as bucket_tables
from pixart_jax.data import images
from pixart_jax.data.sources.listed import write_cache_file
from pixart_jax.data.sources.sample import Source, faults_of
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import cache_folder
from pixart_jax.images import to_model

_KEPT_FROM = 5_000  # pictures; a smaller set is decoded at each start
_DECODERS = 8  # threads; Pillow lets go of the interpreter while it decodes


class Samples(Protocol):
    """The face that the loader sees."""

    buckets: tuple[tuple[int, int], ...]
    bucket_of: np.ndarray

    def read(
        self, indices: np.ndarray, bucket: int, draws: np.ndarray
    ) -> dict[str, np.ndarray]: ...


def assign_all(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """int16 [n]: the number in ``buckets`` of each (height, width) of ``sizes`` [n, 2]; −1 for (0,
    0), an unreadable image."""
    buckets = [tuple(b) for b in buckets]
    kinds, which = np.unique(sizes, axis=0, return_inverse=True)
    numbers = [
        buckets.index(bucket_tables.assign(int(h), int(w), buckets)) if h > 0 and w > 0 else -1
        for h, w in kinds
    ]
    return np.array(numbers, np.int16)[which.reshape(-1)]


class CaptionMix:
    """Caption kinds with weights: one draw in [0, 1) chooses the kind, and within the kind one of
    its texts.

    Where a sample lacks the kind that was chosen it takes one of its others, in proportion to their
    weights: so in a mix of long 3 : short 1 whoever has no long text shows the short one always. A
    sample that has none of the mix is no sample of it.
    """

    def __init__(self, mix: Sequence[tuple[str, float]], known: Sequence[str], source: str):
        self.kinds = tuple(kind for kind, weight in mix if weight > 0)
        for kind in self.kinds:
            if kind not in known:
                raise UserError(
                    f"{source} has no captions of kind "
                    f"{kind!r}{nearest(kind, known) if known else ' (it has none at all)'}"
                )
        self._weights = np.array([weight for _, weight in mix if weight > 0], float)
        self._edges = _edges(self._weights)

    def choose(self, draw: float, present: Container[str] | None = None) -> tuple[str, float]:
        """(kind, the rest of the draw, again uniform in [0, 1)). present: kinds that the sample
        has, one of the mix at least; None: all."""
        which, rest = _chosen(self._edges, draw)
        if present is None or self.kinds[which] in present:
            return self.kinds[which], rest
        others = [i for i, kind in enumerate(self.kinds) if kind in present]
        which, rest = _chosen(_edges(self._weights[others]), rest)
        return self.kinds[others[which]], rest


def _edges(weights: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])


def _chosen(edges: np.ndarray, draw: float) -> tuple[int, float]:
    i = int(np.searchsorted(edges[1:-1], draw, side="right"))
    return i, min((draw - edges[i]) / (edges[i + 1] - edges[i]), np.nextafter(1.0, 0.0))


def pad_length(longest: int, cap: int) -> int:
    """Text length that a whole stage is padded to: the longest text, rounded up to 8, at most
    ``cap``."""
    return min(-(-longest // 8) * 8, cap)


class ImageSamples:
    """Pictures straight from a source, for the autoencoder: {"images": float32 [b, h, w, 3] in [−1,
    1], "key"}.

    Every picture is decoded once when the set is opened: one that cannot be is named in the
    source's faults and left out, for no picture may take its place in the middle of an epoch.
    Decoded pixels stay in memory where the whole set fits into ``cache_bytes``.
    """

    def __init__(
        self, source: Source, buckets: Sequence[tuple[int, int]], *, cache_bytes: int = 2**30
    ):
        self.source, self.buckets = source, tuple(tuple(b) for b in buckets)
        self.bucket_of = assign_all(source.sizes(), self.buckets)
        self.faults = faults_of(source)
        rows = [int((self.bucket_of == i).sum()) for i in range(len(self.buckets))]
        self._cache: list[np.ndarray] | None = None
        if sum(n * h * w * 3 for n, (h, w) in zip(rows, self.buckets)) <= cache_bytes:
            self._cache = [
                np.empty((n, h, w, 3), np.uint8) for n, (h, w) in zip(rows, self.buckets)
            ]
            # a sample's row in its bucket's array
            self._row = np.zeros(len(self.bucket_of), np.int64)
            for i in range(len(self.buckets)):
                self._row[self.bucket_of == i] = np.arange(rows[i])
            # set once the pixels are there
            self._keys: list[str | None] = [None] * len(self.bucket_of)
        self._leave_out_unreadable()

    def _leave_out_unreadable(self) -> None:
        """Decode everything once; of a large set what came of it is kept in the cache folder, and
        the next start need not."""
        count = len(self.bucket_of)
        seal = hashlib.sha256(repr((self.source.fingerprint, self.buckets)).encode()).hexdigest()
        file = cache_folder() / "unreadable" / f"{seal}.npy"
        known = count >= _KEPT_FROM and file.exists()
        doubtful = np.load(file) if known else np.arange(count)

        def trouble(index: int) -> tuple[int, str, str] | None:
            try:
                self._pixels(index, max(int(self.bucket_of[index]), 0))
            except images.UnreadableImage as fault:
                key, colon, reason = str(fault).partition(": ")
                return (index, key, reason) if colon else (index, f"sample {index}", str(fault))

        with (
            concurrent.futures.ThreadPoolExecutor(_DECODERS) as readers,
            tqdm(
                total=len(doubtful),
                desc=f"reading {self.source.name}",
                unit=" images",
                delay=2,
                leave=False,
            ) as bar,
        ):
            bad = []
            for start in range(0, len(doubtful), 4096):  # a bounded number of tasks at once
                for found in readers.map(trouble, (int(i) for i in doubtful[start : start + 4096])):
                    bar.update()
                    if found:
                        bad.append(found[0])
                        self.faults.add(found[1], "unreadable image", found[2])
        self.bucket_of[bad] = -1
        if count >= _KEPT_FROM and not known:
            write_cache_file(file, lambda out: np.save(out, np.array(bad, np.int64)))

    def _pixels(self, index: int, bucket: int) -> tuple[np.ndarray, str]:
        if self._cache is not None and self._keys[index] is not None:
            return self._cache[bucket][self._row[index]], self._keys[index]
        sample = self.source[index]
        pixels = sample.fitted(self.buckets[bucket])
        if self._cache is not None:
            self._cache[bucket][self._row[index]] = pixels
            self._keys[index] = sample.key
        return pixels, sample.key

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket."""
        rows = [self._pixels(int(i), bucket) for i in indices]
        return {
            "images": to_model(np.stack([pixels for pixels, _ in rows])),
            "key": np.array([key for _, key in rows]),
        }


class TokenSamples:
    """Token ids of captions, for the text encoder: {"input_ids": int32 [b, l], "lengths": int32
    [b], "key"}.

    Every caption of the mix is tokenised once, when the set is opened; a sample that has none of
    it, or no target, is named in the source's faults and left out. tokenizer: transformers'
    protocol; texts beyond max_text_tokens are cut, their end token kept. clean: what is done to a
    text first (captions.clean), nothing by default.
    target: a kind of caption whose first text each row brings along: {"target_ids": int32 [b, m],
    "target_lengths": int32 [b], "itself": bool [b], whether the row's caption is that very text}.
    """

    buckets = ((0, 0),)  # text has no size: one bucket for all

    def __init__(
        self,
        source: Source,
        tokenizer,
        captions: Sequence[tuple[str, float]],
        max_text_tokens: int,
        clean: Callable[[str], str] = str,
        target: str | None = None,
    ):
        self._mix = CaptionMix(captions, source.caption_kinds, source.name)
        self._target = target
        self.faults = faults_of(source)
        read = dict.fromkeys(
            self._mix.kinds
            + (
                CaptionMix([(target, 1.0)], source.caption_kinds, source.name).kinds
                if target
                else ()
            )
        )
        self._pad = tokenizer.pad_token_id or 0
        self._keys: list[str] = []
        texts: list[str] = []
        places: list[dict[str, tuple[int, int]]] = []  # sample → kind → its texts' range
        lacking: list[int] = []
        for index in range(len(source)):
            sample = source[index]
            self._keys.append(sample.key)
            places.append({})
            try:
                said = {kind: sample.captions[kind] for kind in read if sample.captions.get(kind)}
                sample.captions_of_kinds(self._mix.kinds)
                if target:
                    sample.texts(target)
            except UserError as fault:
                self.faults.add(sample.key, "missing caption", str(fault).partition(": ")[2])
                lacking.append(index)
                continue
            for kind, raw in said.items():
                places[-1][kind] = (len(texts), len(texts) + len(raw))
                texts.extend(clean(text) for text in raw)
        self._places = places
        self._ids = tokenize(tokenizer, texts, max_text_tokens)
        self.length = pad_length(max([1, *map(len, self._ids)]), max_text_tokens)
        self.bucket_of = np.zeros(len(places), np.int16)
        self.bucket_of[lacking] = -1

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows, each with the caption that its draw chooses."""
        chosen = []
        for index, draw in zip(indices, draws):
            kind, rest = self._mix.choose(draw, self._places[index])
            first, end = self._places[index][kind]
            chosen.append(first + int(rest * (end - first)))
        ids, lengths = self._padded(chosen)
        batch = {
            "input_ids": ids,
            "lengths": lengths,
            "key": np.array([self._keys[i] for i in indices]),
        }
        if self._target is None:
            return batch
        targets = [self._places[index][self._target][0] for index in indices]
        ids, lengths = self._padded(targets)
        return batch | {
            "target_ids": ids,
            "target_lengths": lengths,
            "itself": np.array(chosen) == np.array(targets),
        }

    def _padded(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [b, l], lengths [b]) of texts by their numbers."""
        ids = np.full((len(numbers), self.length), self._pad, np.int32)
        for row, number in enumerate(numbers):
            ids[row, : len(self._ids[number])] = self._ids[number]
        # Attention needs a token, even of "" without an end mark.
        return ids, np.array([max(len(self._ids[number]), 1) for number in numbers], np.int32)


def tokenize(tokenizer, texts: Sequence[str], max_text_tokens: int) -> list[np.ndarray]:
    """int32 ids of each text, end token included, without padding, cut at max_text_tokens."""
    out: list[np.ndarray] = []
    for start in range(0, len(texts), 1024):
        found = tokenizer(
            list(texts[start : start + 1024]),
            max_length=max_text_tokens,
            truncation=True,
            padding=False,
        )
        out.extend(np.asarray(ids, np.int32) for ids in found["input_ids"])
    return out

"""What a training batch is made of: pictures, token ids, or encoded records. Each kind knows its buckets and reads rows.

All three have the same face, which the loader relies on: ``bucket_of`` (int [n]: number of each sample's bucket, −1 where it
cannot be used), ``buckets`` ((height, width) by number) and ``read(indices, bucket, draws) → {name: numpy array}``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from pixart_jax.data import buckets as bucket_tables
from pixart_jax.data import images
from pixart_jax.data.sources import Source
from pixart_jax.errors import UserError, nearest


class Samples(Protocol):
    """The face that the loader sees."""

    buckets: tuple[tuple[int, int], ...]
    bucket_of: np.ndarray

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]: ...


def assign_all(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """int16 [n]: the number in ``buckets`` of each (height, width) of ``sizes`` [n, 2]; −1 for (0, 0), an unreadable image."""
    buckets = [tuple(b) for b in buckets]
    kinds, which = np.unique(sizes, axis=0, return_inverse=True)
    numbers = [buckets.index(bucket_tables.assign(int(h), int(w), buckets)) if h > 0 and w > 0 else -1 for h, w in kinds]
    return np.array(numbers, np.int16)[which.reshape(-1)]


class CaptionMix:
    """Caption kinds with weights: one draw in [0, 1) chooses the kind, and within the kind one of its texts."""

    def __init__(self, mix: Sequence[tuple[str, float]], known: Sequence[str], source: str):
        self.kinds = tuple(kind for kind, weight in mix if weight > 0)
        for kind in self.kinds:
            if kind not in known:
                raise UserError(f"{source} has no captions of kind {kind!r}{nearest(kind, known) if known else ' (it has none at all)'}")
        weights = np.array([weight for _, weight in mix if weight > 0], float)
        self._edges = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])

    def choose(self, draw: float) -> tuple[str, float]:
        """(kind, the rest of the draw, again uniform in [0, 1))."""
        i = int(np.searchsorted(self._edges[1:-1], draw, side="right"))
        return self.kinds[i], min((draw - self._edges[i]) / (self._edges[i + 1] - self._edges[i]), np.nextafter(1.0, 0.0))


def fixed_length(longest: int, cap: int) -> int:
    """Text length that a whole stage is padded to: the longest text, rounded up to 8, at most ``cap``."""
    return min(-(-longest // 8) * 8, cap)


class ImageSamples:
    """Pictures straight from a source, for the autoencoder: {"images": float32 [b, h, w, 3] in [−1, 1], "key"}.

    Decoded pixels stay in memory where the whole set fits into ``cache_bytes``.
    """

    def __init__(self, source: Source, buckets: Sequence[tuple[int, int]], *, cache_bytes: int = 2**30):
        self.source, self.buckets = source, tuple(tuple(b) for b in buckets)
        self.bucket_of = assign_all(source.sizes(), self.buckets)
        rows = [int((self.bucket_of == i).sum()) for i in range(len(self.buckets))]
        self._cache: list[np.ndarray] | None = None
        if sum(n * h * w * 3 for n, (h, w) in zip(rows, self.buckets)) <= cache_bytes:
            self._cache = [np.empty((n, h, w, 3), np.uint8) for n, (h, w) in zip(rows, self.buckets)]
            self._row = np.zeros(len(self.bucket_of), np.int64)  # a sample's row in its bucket's array
            for i in range(len(self.buckets)):
                self._row[self.bucket_of == i] = np.arange(rows[i])
            self._keys: list[str | None] = [None] * len(self.bucket_of)  # set once the pixels are there

    def _pixels(self, index: int, bucket: int) -> tuple[np.ndarray, str]:
        if self._cache is not None and self._keys[index] is not None:
            return self._cache[bucket][self._row[index]], self._keys[index]
        sample = self.source[index]
        pixels, _ = images.to_bucket(sample.pixels(), self.buckets[bucket])
        if self._cache is not None:
            self._cache[bucket][self._row[index]] = pixels
            self._keys[index] = sample.key
        return pixels, sample.key

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket."""
        rows = [self._pixels(int(i), bucket) for i in indices]
        return {"images": images.to_model(np.stack([pixels for pixels, _ in rows])), "key": np.array([key for _, key in rows])}


class TokenSamples:
    """Token ids of captions, for the text encoder: {"input_ids": int32 [b, l], "lengths": int32 [b], "key"}.

    Every caption of the mix is tokenised once, when the set is opened. tokenizer: transformers' protocol; texts beyond
    max_text_tokens are cut, their end token kept. clean: what is done to a text first (captions.clean), nothing by default.
    target: a kind of caption whose first text each row brings along: {"target_ids": int32 [b, m], "target_lengths": int32 [b],
    "itself": bool [b], whether the row's caption is that very text}.
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
        read = dict.fromkeys(self._mix.kinds + (CaptionMix([(target, 1.0)], source.caption_kinds, source.name).kinds if target else ()))
        self._pad = tokenizer.pad_token_id or 0
        self._keys: list[str] = []
        texts: list[str] = []
        places: list[dict[str, tuple[int, int]]] = []  # sample → kind → its texts' range
        for index in range(len(source)):
            sample = source[index]
            self._keys.append(sample.key)
            places.append({})
            for kind in read:
                found = [clean(text) for text in sample.texts(kind)]
                places[-1][kind] = (len(texts), len(texts) + len(found))
                texts.extend(found)
        self._places = places
        self._ids = tokenize(tokenizer, texts, max_text_tokens)
        self.length = fixed_length(max(1, *map(len, self._ids)), max_text_tokens)
        self.bucket_of = np.zeros(len(places), np.int16)

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows, each with the caption that its draw chooses."""
        chosen = []
        for index, draw in zip(indices, draws):
            kind, rest = self._mix.choose(draw)
            first, end = self._places[index][kind]
            chosen.append(first + int(rest * (end - first)))
        ids, lengths = self._padded(chosen)
        batch = {"input_ids": ids, "lengths": lengths, "key": np.array([self._keys[i] for i in indices])}
        if self._target is None:
            return batch
        targets = [self._places[index][self._target][0] for index in indices]
        ids, lengths = self._padded(targets)
        return batch | {"target_ids": ids, "target_lengths": lengths, "itself": np.array(chosen) == np.array(targets)}

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
        found = tokenizer(list(texts[start : start + 1024]), max_length=max_text_tokens, truncation=True, padding=False)
        out.extend(np.asarray(ids, np.int32) for ids in found["input_ids"])
    return out

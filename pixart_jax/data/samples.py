"""Training samples: images and token ids. Each kind of samples assigns buckets and reads rows of a
batch; encoded records are in data/encoded.py, the official features in data/features.py."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np

from pixart_jax import plots
from pixart_jax.data import buckets as bucket_tables
from pixart_jax.data import images
from pixart_jax.data.sources.indexed import cached_json, in_threads
from pixart_jax.data.sources.sample import Source, faults_of
from pixart_jax.errors import UserError, nearest
from pixart_jax.images import to_model
from pixart_jax.remote_path import Location
from pixart_jax.text import padded_length

BUCKETS_PNG = "buckets.png"
_DECODERS = 8  # threads; Pillow releases the interpreter lock while it decodes


class Samples(abc.ABC):
    """What the loader reads.

    buckets: (height, width) in px by number. bucket_of: int [n], each sample's bucket, −1 if
    unused. length: tokens that texts are padded to, 0 without texts. identity: of encoded records
    (records.Manifest), else None. fingerprint: changes with the samples or their order. Of encoded
    shards, shard_starts: the first sample of each; fetch: where they lie in a bucket, has threads
    fetch those of these samples.
    """

    buckets: tuple[tuple[int, int], ...]
    bucket_of: np.ndarray
    fingerprint: str
    length = 0
    identity: Mapping[str, str] | None = None
    shard_starts: Sequence[int] | np.ndarray = ()
    fetch: Callable[[np.ndarray], None] | None = None

    def __len__(self) -> int:
        return len(self.bucket_of)

    @abc.abstractmethod
    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket. draws: float64 in [0, 1), one a row, for all random choices."""


def second_draw(draw: float) -> float:
    """A second draw in [0, 1), from the first as a seed."""
    return np.random.default_rng(np.float64(draw).view(np.uint64)).random()


def assign_all(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """int16 [n]: the number in ``buckets`` of each (height, width) in ``sizes`` [n, 2]; else −1."""
    buckets = [(height, width) for height, width in buckets]
    kinds, which = np.unique(sizes, axis=0, return_inverse=True)
    numbers = [
        buckets.index(bucket_tables.assign(int(h), int(w), buckets)) if h > 0 and w > 0 else -1
        for h, w in kinds
    ]
    return np.array(numbers, np.int16)[which.reshape(-1)]


def check_buckets(
    name: str, found: Sequence[tuple[int, int]], wanted: Iterable[tuple[int, int]] | None
) -> None:
    """Raise UserError if latents have a (height, width) not among the stage's buckets."""
    if wanted is None:
        return
    known = list(wanted)
    if others := [size for size in found if size not in known]:
        raise UserError(
            f"{name} was encoded at {_show_sizes(others)}, which the stage's buckets "
            f"({_show_sizes(known)}) do not hold: name those of the set, or encode again"
        )


def _show_sizes(sizes: Sequence[tuple[int, int]], limit: int = 4) -> str:
    """'64×64, 64×96 and 3 more'."""
    shown = ", ".join(f"{height}×{width}" for height, width in sizes[:limit])
    return shown + (f" and {len(sizes) - limit} more" if len(sizes) > limit else "")


def write_bucket_chart(
    path: Location, counts: Mapping[tuple[int, int], int], title: str = "samples"
) -> None:
    """Draw a bar for each (height, width) in px with its number of samples, tall buckets last."""
    ordered = sorted(counts.items(), key=lambda item: (item[0][0] / item[0][1], item[0]))
    values = {f"{height}×{width}": count for (height, width), count in ordered}
    title = f"{title}: {sum(counts.values()):,} in {len(values)} buckets"
    plots.bars(path, values, title=title, axis="samples")


class CaptionMix:
    """Caption kinds with weights: one draw in [0, 1) chooses the kind, and a text of that kind. A
    sample that lacks the chosen kind shows another of its kinds, in proportion to their weights."""

    def __init__(self, mix: Iterable[tuple[str, float]], known: Sequence[str], source: str):
        weights = {kind: weight for kind, weight in mix if weight > 0}
        self.kinds = tuple(weights)
        for kind in self.kinds:
            if kind not in known:
                hint = nearest(kind, known) or " (it has none at all)"
                raise UserError(f"{source} has no captions of kind {kind!r}{hint}")
        self._weights = np.array([*weights.values()], float)

    def choose(self, draw: float, present: Container[str] | None = None) -> tuple[str, float]:
        """(kind, the rest of the draw). present: the sample's kinds."""
        which, rest = _choose(self._weights, draw)
        if present is None or self.kinds[which] in present:
            return self.kinds[which], rest
        others = [i for i, kind in enumerate(self.kinds) if kind in present]
        which, rest = _choose(self._weights[others], rest)
        return self.kinds[others[which]], rest


def _choose(weights: np.ndarray, draw: float) -> tuple[int, float]:
    edges = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
    i = int(np.searchsorted(edges[1:-1], draw, side="right"))
    rest = (draw - edges[i]) / (edges[i + 1] - edges[i])
    return i, float(min(rest, np.nextafter(1.0, 0.0)))


def encoded_length(name: str, longest: int, cap: int) -> int:
    """Tokens that text states are padded to. Raises UserError above the cap: cut states of a whole
    text are not the states of the cut text."""
    if longest > cap:
        raise UserError(
            f"{name} holds texts of {longest} tokens, more than max_text_tokens = {cap}: raise it"
        )
    return padded_length(longest, cap)


def tokenize(tokenizer, texts: Sequence[str], max_text_tokens: int) -> list[np.ndarray]:
    """int32 ids of each text, with the end token, cut at max_text_tokens, without padding."""
    out: list[np.ndarray] = []
    for start in range(0, len(texts), 1024):
        some = list(texts[start : start + 1024])
        found = tokenizer(some, max_length=max_text_tokens, truncation=True, padding=False)
        out.extend(np.asarray(ids, np.int32) for ids in found["input_ids"])
    return out


class ImageSamples(Samples):
    """Images of a source, for the autoencoder: {"images": float32 [b, h, w, 3] in [−1, 1], "key"}.

    Every image is decoded once when the set is opened; unreadable ones are named and left out.
    Decoded pixels of a set that fits ``cache_bytes`` stay.
    """

    def __init__(
        self, source: Source, buckets: Sequence[tuple[int, int]], *, cache_bytes: int = 2**30
    ):
        self.source, self.faults = source, faults_of(source)
        self.fingerprint = source.fingerprint
        self.buckets = tuple((height, width) for height, width in buckets)
        self.bucket_of = assign_all(source.sizes(), self.buckets)
        used = np.bincount(self.bucket_of[self.bucket_of >= 0], minlength=len(self.buckets))
        total = sum(int(n) * h * w * 3 for n, (h, w) in zip(used, self.buckets))
        self._cached = total <= cache_bytes
        self._decoded: dict[int, tuple[np.ndarray, str]] = {}
        identity = hashlib.sha256(repr((source.fingerprint, self.buckets)).encode()).hexdigest()
        bad = cached_json("unreadable", identity, len(self.bucket_of), self._unreadable)
        for index, place, detail in bad:
            self.faults.add(place, "unreadable image", detail)
            self.bucket_of[index] = -1

    def _unreadable(self) -> list[tuple[int, str, str]]:
        """Decode every image. (index, key, reason) of the unreadable ones."""

        def error_of(index: int) -> str | None:
            try:
                self._pixels(index, max(int(self.bucket_of[index]), 0))
            except images.UnreadableImage as error:
                return str(error)
            return None

        indices = range(len(self.bucket_of))
        errors = in_threads(error_of, indices, f"reading {self.source.name}", threads=_DECODERS)
        found = []
        for index, error in enumerate(errors):
            if error is not None:
                key, colon, reason = error.partition(": ")
                place, detail = (key, reason) if colon else (f"sample {index}", error)
                found.append((index, place, detail))
        return found

    def _pixels(self, index: int, bucket: int) -> tuple[np.ndarray, str]:
        if index in self._decoded:
            return self._decoded[index]
        sample = self.source[index]
        found = np.ascontiguousarray(sample.fitted(self.buckets[bucket])), sample.key
        if self._cached:
            self._decoded[index] = found
        return found

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket."""
        rows = [self._pixels(int(i), bucket) for i in indices]
        return {
            "images": to_model(np.stack([pixels for pixels, _ in rows])),
            "key": np.array([key for _, key in rows]),
        }


class TokenSamples(Samples):
    """Token ids of captions, for the text encoder: {"input_ids", "target_ids": int32 [b, l],
    "lengths", "target_lengths": int32 [b], "is_target": bool [b], "key"}.

    All captions are tokenised when the set is opened, cut at max_text_tokens. target: the kind of
    caption whose first text each row brings along; is_target: whether that is the row's own. A
    sample without it, or without any kind of the mix, is named and left out.
    """

    buckets = ((0, 0),)  # text has no size

    def __init__(
        self,
        source: Source,
        tokenizer,
        captions: Sequence[tuple[str, float]],
        max_text_tokens: int,
        target: str,
    ):
        self._mix = CaptionMix(captions, source.caption_kinds, source.name)
        (self._target,) = CaptionMix([(target, 1.0)], source.caption_kinds, source.name).kinds
        self.faults, self.fingerprint = faults_of(source), source.fingerprint
        self._pad = tokenizer.pad_token_id or 0
        self._keys: list[str] = []
        self._ranges: list[dict[str, range]] = []  # sample → kind → numbers of its texts
        self.bucket_of = np.zeros(len(source), np.int16)
        texts: list[str] = []
        for index in range(len(source)):
            sample = source[index]
            self._keys.append(sample.key)
            self._ranges.append({})
            try:
                found = sample.captions_of_kinds(self._mix.kinds)
                found[target] = sample.texts(target)
            except UserError as error:
                self.faults.add(sample.key, "missing caption", str(error).partition(": ")[2])
                self.bucket_of[index] = -1
                continue
            for kind, some in found.items():
                self._ranges[index][kind] = range(len(texts), len(texts) + len(some))
                texts.extend(some)
        self._ids = tokenize(tokenizer, texts, max_text_tokens)
        self.length = padded_length(max(map(len, self._ids), default=1), max_text_tokens)

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows, each with the caption that its draw chooses."""
        chosen = []
        for index, draw in zip(indices, draws):
            kind, rest = self._mix.choose(draw, self._ranges[index])
            numbers = self._ranges[index][kind]
            chosen.append(numbers[int(rest * len(numbers))])
        targets = [self._ranges[index][self._target][0] for index in indices]
        ids, lengths = self._padded(chosen)
        target_ids, target_lengths = self._padded(targets)
        return {
            "input_ids": ids,
            "lengths": lengths,
            "target_ids": target_ids,
            "target_lengths": target_lengths,
            "is_target": np.array(chosen) == np.array(targets),
            "key": np.array([self._keys[i] for i in indices]),
        }

    def _padded(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [b, l], lengths [b]) of texts by their numbers."""
        ids = np.full((len(numbers), self.length), self._pad, np.int32)
        for row, number in enumerate(numbers):
            ids[row, : len(self._ids[number])] = self._ids[number]
        # Attention needs a token, even of "" without an end mark.
        return ids, np.array([max(len(self._ids[number]), 1) for number in numbers], np.int32)

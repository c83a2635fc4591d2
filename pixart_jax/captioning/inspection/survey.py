"""One pass over a source: figures of every sample looked at, and the few pictures that are
shown."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import heapq
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from pixart_jax.captioning.inspection import duplicates
from pixart_jax.data import buckets as bucket_tables
from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.samples import tokenize
from pixart_jax.data.sources import Source
from pixart_jax.errors import UserError
from pixart_jax.text import clean_caption

_CHUNK = 256  # samples read ahead of the count
_LONGEST = 4096  # tokens; longer texts are counted as this long


@dataclasses.dataclass(frozen=True)
class Options:
    """buckets: (height, width) in px. shown: pictures a bucket on the page. distance: bits of the
    perceptual hash that duplicates may differ in; None looks for none. looked_at: so many samples,
    drawn by ``seed``; None: all. thumbnail: longer side in px."""

    buckets: tuple[tuple[int, int], ...]
    max_text_tokens: int = 120
    shown: int = 12
    distance: int | None = 4
    looked_at: int | None = None
    thumbnail: int = 192
    seed: int = 0
    threads: int = 4


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture on the page, cropped as training would crop it. jpeg: its bytes; size: (height,
    width) in px of the original."""

    key: str
    jpeg: bytes
    size: tuple[int, int]
    captions: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass
class Texts:
    """Captions of one kind. words, tokens: length → how many texts; cut: texts longer than the
    cap."""

    samples: int = 0
    texts: int = 0
    empty: int = 0
    repeated: int = 0
    words: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    tokens: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    cut: int = 0


@dataclasses.dataclass
class Survey:
    """What was found. of: samples of the source; enlarged: pictures smaller than their bucket;
    groups: duplicates, as keys."""

    source: str
    of: int
    looked_at: int = 0
    buckets: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    enlarged: int = 0
    sizes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int32))
    labels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    texts: dict[str, Texts] = dataclasses.field(default_factory=dict)
    shown: dict[tuple[int, int], list[Shown]] = dataclasses.field(default_factory=dict)
    groups: list[list[str]] = dataclasses.field(default_factory=list)
    group_pictures: list[list[Shown]] = dataclasses.field(default_factory=list)
    faults: BadRecords = dataclasses.field(default_factory=BadRecords)


@dataclasses.dataclass(frozen=True)
class _Look:
    """What one sample gives. picture: None where there is none that can be read."""

    key: str
    label: int
    captions: Mapping[str, tuple[str, ...]]
    size: tuple[int, int] = (0, 0)
    bucket: int = -1
    hash: np.uint64 = np.uint64(0)
    jpeg: bytes = b""
    trouble: str | None = None


def survey(
    source: Source,
    options: Options,
    tokenizer=None,
    *,
    faults: BadRecords | None = None,
    progress: bool = True,
) -> Survey:
    """Look at a source's samples. tokenizer: counts the tokens of captions, cleaned as training
    cleans them; None counts words alone."""
    found = Survey(source.name, len(source), faults=faults if faults is not None else BadRecords())
    found.buckets = dict.fromkeys(options.buckets, 0)
    indices = np.arange(len(source))
    if options.looked_at is not None and options.looked_at < len(source):
        indices = np.sort(
            np.random.default_rng(options.seed).choice(
                len(source), options.looked_at, replace=False
            )
        )
    found.looked_at = len(indices)
    # heaps of (−priority, place, look)
    chosen: dict[int, list] = {number: [] for number in range(len(options.buckets))}
    hashes, where, sizes = [], [], []
    seen: dict[str, set[int]] = {}
    bar = tqdm(total=len(indices), unit=" samples", desc="looking", disable=not progress)
    with bar, concurrent.futures.ThreadPoolExecutor(options.threads) as readers:
        for start in range(0, len(indices), _CHUNK):
            part = indices[start : start + _CHUNK]
            looks = list(readers.map(lambda index: _look(source, int(index), options), part))
            for index, look in zip(part, looks):
                if look.trouble:
                    found.faults.add(look.key, "unreadable image", look.trouble)
                    continue
                bucket = options.buckets[look.bucket]
                found.buckets[bucket] += 1
                found.enlarged += look.size[0] < bucket[0] or look.size[1] < bucket[1]
                found.labels[look.label] += 1
                sizes.append(look.size)
                hashes.append(look.hash)
                where.append(int(index))
                heapq.heappush(
                    chosen[look.bucket], (-_priority(look.key, options.seed), int(index), look)
                )
                if len(chosen[look.bucket]) > options.shown:
                    heapq.heappop(chosen[look.bucket])
            _read(found, looks, tokenizer, options.max_text_tokens, seen)
            bar.update(len(part))
    found.sizes = np.array(sizes, np.int32).reshape(-1, 2)
    for number, heap in chosen.items():
        if heap:
            found.shown[options.buckets[number]] = [
                _shown(look) for _, _, look in sorted(heap, key=lambda item: item[1])
            ]
    if options.distance is not None and hashes:
        for group in duplicates.groups(np.array(hashes, np.uint64), options.distance):
            found.groups.append([source[where[i]].key for i in group[:100]])
            if len(found.group_pictures) < 50:
                found.group_pictures.append(
                    [_shown(_look(source, where[i], options)) for i in group[:6]]
                )
    return found


def _look(source: Source, index: int, options: Options) -> _Look:
    sample = source[index]
    about = (sample.key, sample.label, sample.captions)
    try:
        pixels = sample.pixels()
    except UserError as fault:
        return _Look(*about, trouble=str(fault).removeprefix(f"{sample.key}: "))
    height, width = pixels.shape[:2]
    bucket = bucket_tables.assign(height, width, options.buckets)
    fitted, _ = images.to_bucket(pixels, bucket)
    scale = min(1.0, options.thumbnail / max(bucket))
    small = Image.fromarray(fitted)
    if scale < 1:
        small = small.resize(
            (max(1, round(bucket[1] * scale)), max(1, round(bucket[0] * scale))),
            Image.Resampling.LANCZOS,
        )
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=85)
    hashed = duplicates.perceptual_hash(pixels) if options.distance is not None else np.uint64(0)
    return _Look(*about, (height, width), options.buckets.index(bucket), hashed, jpeg.getvalue())


def _shown(look: _Look) -> Shown:
    return Shown(look.key, look.jpeg, look.size, look.captions)


def _priority(key: str, seed: int) -> int:
    """Which pictures are shown: the same ones whatever the order, the number of threads or what
    else is in the set."""
    return int.from_bytes(
        hashlib.blake2b(f"{seed} {key}".encode("utf-8", "replace"), digest_size=8).digest()
    )


def _read(
    found: Survey, looks: Sequence[_Look], tokenizer, most: int, seen: dict[str, set[int]]
) -> None:
    """Count the captions of a chunk."""
    for kind in dict.fromkeys(kind for look in looks for kind in look.captions):
        kept = found.texts.setdefault(kind, Texts())
        known = seen.setdefault(kind, set())
        said = [look.captions[kind] for look in looks if look.captions.get(kind)]
        texts = [text for each in said for text in each]
        kept.samples += len(said)
        kept.texts += len(texts)
        for text in texts:
            kept.words[len(text.split())] += 1
            kept.empty += not text.strip()
            mark = int.from_bytes(
                hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
            )
            kept.repeated += mark in known
            known.add(mark)
        if tokenizer is not None and texts:
            lengths = [
                len(ids)
                for ids in tokenize(tokenizer, [clean_caption(text) for text in texts], _LONGEST)
            ]
            kept.tokens.update(lengths)
            kept.cut += sum(length > most for length in lengths)

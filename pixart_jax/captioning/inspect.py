"""One pass over a source, and what it found: a page index.html with its pictures, and inspect.json
with every figure."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import html
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pixart_jax.data import buckets as bucket_tables
from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.samples import tokenize
from pixart_jax.data.sources import Source
from pixart_jax.encoding.options import Bucket, BucketsFlag
from pixart_jax.errors import UserError
from pixart_jax.files import hash64
from pixart_jax.text import clean_caption

FIGURES = "inspect.json"
_CHUNK = 256  # samples read ahead of the count
_LONGEST = 4096  # tokens; longer texts are counted as this long
_THUMBNAIL = 192  # px of the longer side
_HASH_BITS = 64
# on the page; inspect.json has all that were kept
_MAX_FAULTS, _MAX_GROUPS, _GROUP_PICTURES = 500, 50, 6


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """What to look at, and what the page shows."""

    buckets: BucketsFlag = ()
    """HEIGHTxWIDTH in px, separated by commas; or 256 (the default), 512, 1024 or 2048 for that
    base's whole table. Encoded shards have their own."""
    sample: int | None = None
    """Look at so many samples, chosen at random; all by default."""
    max_text_tokens: int = 120
    """Texts of more tokens are cut in training."""
    shown: int = 12
    """Pictures per bucket on the page."""
    duplicates: int = 4
    """Bits of 64 in which the perceptual hashes of duplicates may differ; -1 looks for none."""
    threads: int = 4
    """That read pictures."""
    seed: int = 0
    """Of --sample, and of which pictures are shown."""

    def __post_init__(self):
        limits = {"sample": 1, "max_text_tokens": 1, "shown": 0, "duplicates": -1, "threads": 1}
        for name, least in (limits | {"seed": 0}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
        if self.duplicates > 16:
            raise UserError(
                f"--duplicates {self.duplicates}: at most 16 bits; pictures that have nothing in "
                "common differ in about 32"
            )


@dataclasses.dataclass(frozen=True)
class Look:
    """A sample. jpeg: its picture, cropped as in training; size: (height, width) in px of the
    original; hash: perceptual, 64 bits; error: why the picture cannot be read."""

    key: str
    label: int
    captions: Mapping[str, tuple[str, ...]]
    size: tuple[int, int] = (0, 0)
    bucket: Bucket = (0, 0)
    hash: int = 0
    jpeg: bytes = b""
    error: str = ""


@dataclasses.dataclass
class CaptionFigures:
    """The captions of one kind. words, tokens: length → how many texts; cut: texts longer than the
    limit."""

    samples: int = 0
    texts: int = 0
    empty: int = 0
    repeated: int = 0
    words: Counter[int] = dataclasses.field(default_factory=Counter)
    tokens: Counter[int] = dataclasses.field(default_factory=Counter)
    cut: int = 0


@dataclasses.dataclass
class Survey:
    """What was found. samples: of the source; enlarged: pictures smaller than their bucket; shown:
    pictures by bucket; groups: duplicates, as keys; group_pictures: the first of each group."""

    source: str
    samples: int
    buckets: dict[Bucket, int]
    faults: BadRecords
    looked_at: int = 0
    enlarged: int = 0
    sizes: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    labels: set[int] = dataclasses.field(default_factory=set)
    captions: dict[str, CaptionFigures] = dataclasses.field(default_factory=dict)
    shown: dict[Bucket, list[Look]] = dataclasses.field(default_factory=dict)
    groups: list[list[str]] = dataclasses.field(default_factory=list)
    group_pictures: list[list[Look]] = dataclasses.field(default_factory=list)


def survey(
    source: Source,
    options: InspectOptions,
    tokenizer=None,
    *,
    faults: BadRecords | None = None,
    progress: bool = True,
) -> Survey:
    """Look at a source's samples. tokenizer: counts the tokens of captions, cleaned as in training;
    None counts words alone."""
    buckets = options.buckets or tuple(bucket_tables.TABLES[256].values())
    faults = BadRecords() if faults is None else faults
    found = Survey(source.name, len(source), dict.fromkeys(buckets, 0), faults)
    indices = np.arange(len(source))
    if options.sample is not None and options.sample < len(source):
        random = np.random.default_rng(options.seed)
        indices = np.sort(random.choice(len(source), options.sample, replace=False))
    found.looked_at = len(indices)
    hashes: list[int] = []
    readable: list[int] = []  # their numbers in the source
    texts_seen: set[tuple[str, int]] = set()
    bar = tqdm(total=len(indices), unit=" samples", desc="looking", disable=not progress)
    with bar, concurrent.futures.ThreadPoolExecutor(options.threads) as readers:
        for start in range(0, len(indices), _CHUNK):
            part = indices[start : start + _CHUNK]
            looks = list(readers.map(lambda index: _look(source, index, buckets), part))
            for index, look in zip(part, looks):
                _count_captions(found, look, options.max_text_tokens, tokenizer, texts_seen)
                if look.error:
                    faults.add(look.key, "unreadable image", look.error)
                    continue
                hashes.append(look.hash)
                readable.append(index)
                found.sizes.append(look.size)
                found.labels.add(look.label)
                found.buckets[look.bucket] += 1
                found.enlarged += any(a < b for a, b in zip(look.size, look.bucket))
                # the same pictures are shown whatever the order, the threads or the other samples
                chosen = [*found.shown.get(look.bucket, ()), look]
                chosen.sort(key=lambda one: hash64(f"{options.seed} {one.key}"))
                found.shown[look.bucket] = chosen[: options.shown]
            bar.update(len(part))
    if options.duplicates >= 0:
        for group in duplicate_groups(np.array(hashes, np.uint64), options.duplicates):
            numbers = [readable[i] for i in group]
            found.groups.append([source[number].key for number in numbers[:100]])
            if len(found.group_pictures) < _MAX_GROUPS:
                first = [_look(source, number, buckets) for number in numbers[:_GROUP_PICTURES]]
                found.group_pictures.append(first)
    return found


def _look(source: Source, index: int, buckets: Sequence[Bucket]) -> Look:
    import imagehash

    sample = source[int(index)]
    about = (sample.key, sample.label, sample.captions)
    try:
        pixels = sample.pixels()
    except UserError as error:
        return Look(*about, error=str(error).removeprefix(f"{sample.key}: "))
    height, width = pixels.shape[:2]
    bucket = bucket_tables.assign(height, width, buckets)
    small = Image.fromarray(images.to_bucket(pixels, bucket)[0])
    small.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    small.save(jpeg, "JPEG", quality=85)
    bits = np.packbits(imagehash.phash(Image.fromarray(pixels)).hash)
    number = int.from_bytes(bits.tobytes(), "big")
    return Look(*about, (height, width), bucket, number, jpeg.getvalue())


def _count_captions(
    found: Survey, look: Look, limit: int, tokenizer, seen: set[tuple[str, int]]
) -> None:
    for kind, texts in look.captions.items():
        figures = found.captions.setdefault(kind, CaptionFigures())
        figures.samples += bool(texts)
        figures.texts += len(texts)
        for text in texts:
            figures.words[len(text.split())] += 1
            figures.empty += not text.strip()
            figures.repeated += (kind, hash64(text)) in seen
            seen.add((kind, hash64(text)))
        if tokenizer is not None and texts:
            for ids in tokenize(tokenizer, [clean_caption(text) for text in texts], _LONGEST):
                figures.tokens[len(ids)] += 1
                figures.cut += len(ids) > limit


def duplicate_groups(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
    """Indices of pictures that look the same, largest group first; others are in no group.

    hashes: uint64 [n], ImageHash's phash: signs of the lowest 8×8 frequencies of the picture at
    32×32 gray. Resizing, recompression and small changes of tone change few bits; two different
    photographs differ in about 32. distance: hashes that differ in at most so many bits are linked,
    and links chain. Exact, without comparing all pairs: of distance + 1 bands of bits, two such
    hashes share at least one.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    kinds, which = np.unique(hashes, return_inverse=True)  # equal hashes are one node
    edges = np.linspace(0, _HASH_BITS, distance + 2).astype(int)
    links: list[tuple[int, int]] = []
    for low, high in zip(edges, edges[1:]) if distance else ():
        band = (kinds >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for block in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            for at, i in enumerate(block[:-1]):
                rest = block[at + 1 :]
                near = rest[np.bitwise_count(kinds[rest] ^ kinds[i]) <= distance]
                links += [(i, j) for j in near]
    rows, columns = np.array(links, np.int64).reshape(-1, 2).T
    shape = (len(kinds), len(kinds))
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=shape)
    component = connected_components(graph, directed=False)[1][which.reshape(-1)]
    order = np.argsort(component, kind="stable")
    blocks = np.split(order, np.flatnonzero(np.diff(component[order])) + 1)
    return sorted((b for b in blocks if len(b) > 1), key=lambda b: (-len(b), b[0]))


# ---- the page ----


def write(found: Survey, options: InspectOptions, out: Path, tokenizer_name: str | None) -> Path:
    """Write the folder atomically; return the page. Raises UserError where ``out`` holds anything
    but an earlier page."""
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / FIGURES).exists()):
        raise UserError(
            f"--out {out}: it holds something else than an earlier page; give another folder"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pictures").mkdir(parents=True)
    numbers = figures(found, options, tokenizer_name)
    (partial / FIGURES).write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    page = _page(found, options, numbers, partial)
    (partial / "index.html").write_text(page, encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
    return out / "index.html"


def figures(found: Survey, options: InspectOptions, tokenizer_name: str | None) -> dict[str, Any]:
    """Every number of the page."""
    captions = {}
    for kind, one in found.captions.items():
        captions[kind] = {
            "samples": one.samples,
            "texts": one.texts,
            "empty": one.empty,
            "repeated": one.repeated,
            "words": _spread(one.words),
        }
        if tokenizer_name:
            captions[kind] |= {"tokens": _spread(one.tokens), "cut": one.cut}
    return {
        "source": found.source,
        "samples": found.samples,
        "looked_at": found.looked_at,
        "readable": len(found.sizes),
        "buckets": {f"{h}×{w}": count for (h, w), count in found.buckets.items()},
        "enlarged": found.enlarged,
        "classes": len([label for label in found.labels if label >= 0]),
        "captions": captions,
        "tokenizer": tokenizer_name,
        "max_text_tokens": options.max_text_tokens,
        "duplicate_distance": None if options.duplicates < 0 else options.duplicates,
        "duplicate_groups": found.groups,
        "left_out": dict(found.faults.counts),
        "faults": [{"place": f.place, "kind": f.kind, "detail": f.detail} for f in found.faults],
    }


def _spread(lengths: Mapping[int, int]) -> dict[str, float]:
    """Least, median, 95th percentile, mean and most."""
    if not lengths:
        return {}
    values = np.repeat(list(lengths), list(lengths.values()))
    median, p95 = np.quantile(values, (0.5, 0.95), method="inverted_cdf")
    spread = {"least": int(values.min()), "median": int(median), "p95": int(p95)}
    return spread | {"mean": round(float(values.mean()), 2), "most": int(values.max())}


def _page(found: Survey, options: InspectOptions, numbers: dict[str, Any], folder: Path) -> str:
    overview = {
        "samples": found.samples,
        "looked at": found.looked_at,
        "readable pictures": len(found.sizes),
        "shorter side, px": _text(_spread(Counter(map(min, found.sizes)))),
        "longer side, px": _text(_spread(Counter(map(max, found.sizes)))),
        "smaller than their bucket, enlarged for training": found.enlarged,
        "classes": numbers["classes"],
        "left out": found.faults.summary() or "nothing",
    }
    parts = [_table(overview.items()), "<h2>Buckets</h2>"]
    most = max(found.buckets.values(), default=0)
    bars = {
        name: f"{count} {'█' * (count * 40 // max(1, most))}"
        for name, count in numbers["buckets"].items()
        if count
    }
    parts += [_table(bars.items()), "<h2>Captions</h2>"]
    for kind, counts in numbers["captions"].items():
        rows = {name: _text(value) for name, value in counts.items()}
        parts += [f"<h3>{html.escape(kind)}</h3>", _table(rows.items())]
    if len(found.faults):
        faults = [(f.place, f"{f.kind}: {f.detail}") for f in found.faults]
        parts += [f"<h2>Left out (all: {FIGURES})</h2>", _table(faults[:_MAX_FAULTS])]
    if options.duplicates >= 0:
        limit = f"perceptual hashes differ in at most {options.duplicates} of 64 bits"
        parts.append(f"<h2>Duplicates: {len(found.groups)} groups, {limit}</h2>")
    for number, (keys, looks) in enumerate(zip(found.groups, found.group_pictures)):
        parts.append(f"<h3>Group {number + 1}: {len(keys)} pictures</h3>")
        parts.append(_pictures(looks, folder, f"same-{number:03d}"))
    for (height, width), looks in found.shown.items():
        count = found.buckets[height, width]
        parts.append(f"<h2>{height}×{width} px: {len(looks)} of {count}</h2>")
        parts.append(_pictures(looks, folder, f"{height}x{width}"))
    title, body = html.escape(found.source), "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{title}</title>'
    return (
        f"<!doctype html>\n<html><head>{head}</head><body><h1>{title}</h1>\n{body}</body></html>\n"
    )


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = (
        f"<tr><th align=left>{html.escape(name)}</th><td>{html.escape(_text(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _pictures(looks: Sequence[Look], folder: Path, name: str) -> str:
    """A table: a row per picture with its key, size and captions."""
    rows = []
    for number, look in enumerate(looks):
        file = f"pictures/{name}-{number:02d}.jpg"
        (folder / file).write_bytes(look.jpeg)
        texts = [f"{look.key} ({look.size[0]}×{look.size[1]})"]
        texts += [
            f"{kind}: {text[:2000]}" for kind, some in look.captions.items() for text in some[:3]
        ]
        shown = "<br>".join(map(html.escape, texts))
        rows.append(f'<tr><td><img src="{file}"></td><td>{shown}</td></tr>')
    return f"<table>{''.join(rows)}</table>"

"""``python -m pixart_jax inspect DATA``: a page that shows what a set holds, before anything is
trained on it.

DATA is a source, as encode takes it, or with --vae a folder of encoded shards. The page has
figures, pictures by bucket as training would crop them, captions and how many of them are cut,
duplicates by perceptual hash, and all records left out; inspect.json has every figure.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import html
import io
import json
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from pixart_jax import cli
from pixart_jax.data import buckets as bucket_tables
from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.samples import tokenize
from pixart_jax.data.sources import Sample, Source
from pixart_jax.data.sources.encoded import RecordsSource
from pixart_jax.encoding.options import Bucket, BucketsFlag, SourceSpec
from pixart_jax.errors import UserError
from pixart_jax.files import hash64
from pixart_jax.finite import WHAT, whole
from pixart_jax.images import to_uint8
from pixart_jax.text import EMPTIED, HALVED, clean_caption, cleaning_loss, load_tokenizer

FIGURES = "inspect.json"
_COUNTED = ("samples", "texts", "empty", "repeated", "emptied", "halved")
_CHUNK = 256  # samples read ahead of the count
_LONGEST = 4096  # tokens; longer texts are counted as this long
_THUMBNAIL = 192  # px of the longer side
_HASH_BITS = 64
_ON_PAGE = 500  # entries of a list; inspect.json has all that were kept
_GROUPS, _GROUP_PICTURES = 50, 6  # shown as pictures


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
            raise UserError(f"--duplicates {self.duplicates}: at most 16 of the 64 bits")


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: tyro.conf.OmitArgPrefixes[tyro.conf.PositionalRequiredArgs[SourceSpec]]
    out: Path = Path("inspect")
    """Folder of the page; an earlier page there is replaced."""
    options: tyro.conf.OmitArgPrefixes[InspectOptions] = InspectOptions()
    vae: Path | None = None
    """Of encoded shards: the folder of the VAE that made them, or of a model that holds it; it
    shows what training sees."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "none"
    """A tokenizer's folder, or a model folder that holds one: counts tokens; none counts words
    alone."""
    strict: bool = False
    """Stop at the first record that cannot be read; otherwise it is named, counted and skipped."""


def main(argv: Sequence[str]) -> int:
    """Write the page; return exit status 0. Raises UserError for user errors."""
    arguments = cli.parse(Arguments, argv, prog="python -m pixart_jax inspect", description=__doc__)
    options, vae, tokenizer = arguments.options, arguments.vae, None
    if arguments.tokenizer != "none":
        folder = Path(arguments.tokenizer)
        inner = folder / "tokenizer"
        tokenizer = load_tokenizer(inner if inner.is_dir() else folder)
    faults = BadRecords(arguments.strict)
    source: Source = arguments.source.open(faults)
    if isinstance(source, RecordsSource):
        if options.buckets:
            raise UserError("--buckets: encoded shards have buckets of their own")
        if vae is None:
            raise UserError(f"{source.name} is encoded: give --vae, the folder of its VAE or model")
        options = dataclasses.replace(options, buckets=source.buckets)
        source = DecodedSource(source, vae)
    elif vae is not None:
        raise UserError(f"--vae is for encoded shards, and {source.name} has its pictures")
    found = survey(source, options, tokenizer, faults=faults)
    found.figures["tokenizer"] = arguments.tokenizer if tokenizer else None
    path, figures = write(found, arguments.out), found.figures
    used = sum(count > 0 for count in figures["buckets"].values())
    print(
        f"{figures['looked_at']} samples of {source.name}: {figures['readable']} pictures in "
        f"{used} buckets, {len(figures['duplicate_groups'])} groups alike"
    )
    for kind, one in figures["captions"].items():
        cut = f", {one['cut']} longer than {options.max_text_tokens} tokens" if tokenizer else ""
        lost = "".join(
            f", {one[name]} {how}"
            for name, how in (("emptied", EMPTIED), ("halved", HALVED))
            if one[name]
        )
        print(f"  captions {kind}: {one['texts']} of {one['samples']} samples{cut}{lost}")
    print(f"  {faults.report(figures['readable'])}; {arguments.out / FIGURES} names all")
    print(f"the page: {path}")
    return 0


class DecodedSource:
    """Encoded records with pictures: what the VAE decodes from their latents, which is all that
    training sees. Raises UserError for a VAE that did not make them."""

    def __init__(self, encoded: RecordsSource, vae: Path):
        from pixart_jax.pipeline.encoder_identity import component_identity
        from pixart_jax.weights.component import load_component
        from pixart_jax.weights.hub import model_folder

        vae = model_folder(vae, ("vae",))
        opened: Any = load_component(vae / "vae" if (vae / "vae").is_dir() else vae)
        if component_identity(opened) != encoded.identity.get("vae"):
            raise UserError(f"--vae {vae}: {encoded.name} was encoded with another VAE")
        self._encoded, self._vae, self._one_at_a_time = encoded, opened, threading.Lock()
        self.name, self.fingerprint = encoded.name, encoded.fingerprint
        self.caption_kinds = encoded.caption_kinds
        self.sizes = encoded.sizes  # of the pictures before they were encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> Sample:
        sample = self._encoded[index]
        with self._one_at_a_time:  # so that each bucket compiles once
            pixels = np.asarray(self._vae.decode(self._encoded.latents(index)[None]))[0]
        if not whole(pixels):
            raise UserError(f"{sample.key}: the VAE decodes it to numbers that are {WHAT}")
        png = io.BytesIO()
        Image.fromarray(to_uint8(pixels)).save(png, "PNG")
        return dataclasses.replace(sample, image=png.getvalue())


@dataclasses.dataclass(frozen=True)
class Look:
    """A sample. jpeg: its picture, cropped as in training; size: (height, width) in px of the
    original; hash: perceptual, 64 bits; error: why the picture cannot be read."""

    key: str
    label: int
    captions: Mapping[str, tuple[str, ...]]
    size: tuple[int, int] = (0, 0)
    bucket: int = -1
    hash: int = 0
    jpeg: bytes = b""
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Survey:
    """figures: every number, as inspect.json holds it; pictures: heading → samples shown."""

    figures: dict[str, Any]
    pictures: dict[str, list[Look]]


def survey(
    source: Source,
    options: InspectOptions,
    tokenizer=None,
    *,
    faults: BadRecords | None = None,
    progress: bool = True,
) -> Survey:
    """Look at a source's samples. tokenizer: counts the tokens of captions, cleaned as in training;
    None counts words alone. faults: those of the source, to which unreadable pictures are added."""
    buckets = options.buckets or tuple(bucket_tables.TABLES[256].values())
    faults = BadRecords() if faults is None else faults
    indices = np.arange(len(source))
    if options.sample is not None and options.sample < len(source):
        random = np.random.default_rng(options.seed)
        indices = np.sort(random.choice(len(source), options.sample, replace=False))
    readable: list[tuple[int, ...]] = []  # (index, label, height, width, bucket)
    hashes: list[int] = []
    shown: list[list[Look]] = [[] for _ in buckets]
    captions: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()  # hashes of texts
    bar = tqdm(total=len(indices), unit=" samples", desc="looking", disable=not progress)
    with bar, concurrent.futures.ThreadPoolExecutor(options.threads) as readers:
        for start in range(0, len(indices), _CHUNK):
            part = indices[start : start + _CHUNK]
            for index, look in zip(part, readers.map(lambda i: _look(source, i, buckets), part)):
                _count_captions(captions, look, options.max_text_tokens, tokenizer, seen)
                if look.error:
                    faults.add(look.key, "unreadable image", look.error)
                    continue
                readable.append((index, look.label, *look.size, look.bucket))
                hashes.append(look.hash)
                # the same pictures are shown whatever the order, the threads or the other samples
                chosen = shown[look.bucket]
                chosen.append(look)
                chosen.sort(key=lambda one: hash64(f"{options.seed} {one.key}"))
                del chosen[options.shown :]
            bar.update(len(part))
    table = np.array(readable, np.int64).reshape(-1, 5)
    labels, sizes, smallest = table[:, 1], table[:, 2:4], np.array(buckets)[table[:, 4]]
    counts = np.bincount(table[:, 4], minlength=len(buckets)).tolist()
    groups: list[list[str]] = []
    pictures: dict[str, list[Look]] = {}
    if options.duplicates >= 0 and len(table):
        for group in duplicate_groups(np.array(hashes, np.uint64), options.duplicates):
            numbers = table[group, 0]
            groups.append([source[int(number)].key for number in numbers[:100]])
            if len(groups) <= _GROUPS:
                first = [_look(source, number, buckets) for number in numbers[:_GROUP_PICTURES]]
                pictures[f"duplicates {len(groups)}: {len(group)} pictures"] = first
    names = [f"{height}×{width}" for height, width in buckets]
    for name, chosen, count in zip(names, shown, counts):
        if chosen:
            pictures[f"{name} px: {len(chosen)} of {count}"] = chosen
    for one in captions.values():
        for name in ("words", "tokens"):
            if name in one:
                one[name] = _spread(np.repeat(list(one[name]), list(one[name].values())))
    figures = {
        "source": source.name,
        "samples": len(source),
        "looked_at": len(indices),
        "readable": len(table),
        "shorter_side": _spread(sizes.min(1)),
        "longer_side": _spread(sizes.max(1)),
        "enlarged": int((sizes < smallest).any(1).sum()),
        "buckets": dict(zip(names, counts)),
        "classes": len(np.unique(labels[labels >= 0])),
        "captions": captions,
        "max_text_tokens": options.max_text_tokens,
        "duplicate_distance": None if options.duplicates < 0 else options.duplicates,
        "duplicate_groups": groups,
        "left_out": dict(faults.counts),
        "faults": [{"place": f.place, "kind": f.kind, "detail": f.detail} for f in faults],
    }
    return Survey(figures, pictures)


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
    return Look(*about, (height, width), buckets.index(bucket), number, jpeg.getvalue())


def _count_captions(
    captions: dict[str, dict[str, Any]], look: Look, limit: int, tokenizer, seen: set[int]
) -> None:
    """Add a sample's captions to the counts of their kinds. words, tokens: length → texts; cut:
    texts of more than ``limit`` tokens; repeated: seen before; emptied, halved: by cleaning."""
    for kind, texts in look.captions.items():
        one = captions.setdefault(kind, dict.fromkeys(_COUNTED, 0))
        one["samples"] += bool(texts)
        one["texts"] += len(texts)
        for text in texts:
            one.setdefault("words", Counter())[len(text.split())] += 1
            one["empty"] += not text.strip()
            one["repeated"] += (mark := hash64(f"{kind} {text}")) in seen
            seen.add(mark)
        cleaned = [clean_caption(text) for text in texts]
        losses = [cleaning_loss(*both) for both in zip(texts, cleaned)]
        one["emptied"] += losses.count(EMPTIED)
        one["halved"] += losses.count(HALVED)
        if tokenizer is not None and texts:
            for ids in tokenize(tokenizer, cleaned, _LONGEST):
                one.setdefault("tokens", Counter())[len(ids)] += 1
                one["cut"] = one.get("cut", 0) + (len(ids) > limit)


def duplicate_groups(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
    """Indices of pictures that look the same, largest group first; others are in no group.

    hashes: uint64 [n], ImageHash's phash: signs of the lowest 8×8 frequencies of the picture at
    32×32 gray. Resizing, recompression and small changes of tone change few bits; two different
    photographs differ in about 32. distance: hashes that differ in at most so many bits are linked,
    and links chain. Exact, without comparing all pairs: of distance + 1 bands of bits two such
    share one.
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


def _spread(values: np.ndarray) -> dict[str, float]:
    """Least, median, 95th percentile, mean and most of integers [n]."""
    if not len(values):
        return {}
    least, median, p95, most = np.quantile(values, (0, 0.5, 0.95, 1), method="inverted_cdf")
    spread = {"least": int(least), "median": int(median), "p95": int(p95)}
    return spread | {"mean": round(float(values.mean()), 2), "most": int(most)}


def write(found: Survey, out: Path) -> Path:
    """Write the folder atomically; return the page. Raises UserError for another folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / FIGURES).exists()):
        raise UserError(
            f"--out {out}: it holds something else than an earlier page; give another folder"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pictures").mkdir(parents=True)
    (partial / FIGURES).write_text(json.dumps(found.figures, indent=1) + "\n", encoding="utf-8")
    title = html.escape(found.figures["source"])
    rows = []
    for number, (heading, looks) in enumerate(found.pictures.items()):
        rows.append(f"<tr><th colspan=2>{html.escape(heading)}</th></tr>")
        for place, look in enumerate(looks):
            file = f"pictures/{number:03d}-{place:02d}.jpg"
            (partial / file).write_bytes(look.jpeg)
            texts = {
                kind: [text[:2000] for text in some[:3]] for kind, some in look.captions.items()
            }
            about = {"key": look.key, "size": f"{look.size[0]}×{look.size[1]}", **texts}
            rows.append(f'<tr><td><img src="{file}"></td><td>{_cell(about)}</td></tr>')
    page = (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>\n'
        f"{_cell(found.figures)}\n<table>{''.join(rows)}</table>\n"
    )
    (partial / "index.html").write_text(page, encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
    return out / "index.html"


def _cell(value: Any) -> str:
    """HTML of a figure: a table of a dict, the lines of a list."""
    if isinstance(value, Mapping):
        rows = (
            f"<tr><th>{_cell(name)}</th><td>{_cell(one)}</td></tr>" for name, one in value.items()
        )
        return f"<table>{''.join(rows)}</table>"
    if isinstance(value, list):
        return "<br>".join(_cell(one) for one in value[:_ON_PAGE])
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))

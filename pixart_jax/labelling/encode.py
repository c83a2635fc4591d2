"""Pictures and captions → shards of latents' posterior and text states, made once so that training never waits.

The work is cut into shards before it begins: the samples of each bucket in the source's order, so many a shard. A shard's
batches, and so its bytes, depend on nothing but its samples; a shard that is finished is noted in progress/ and never made
again. So an interrupted run, started again, ends with the very files of an uninterrupted one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from tqdm import tqdm

from pixart_jax.cache import cache_folder
from pixart_jax.captions import clean
from pixart_jax.data import images, records
from pixart_jax.data.samples import assign_all, tokenize
from pixart_jax.data.sources import Source
from pixart_jax.errors import UserError, nearest
from pixart_jax.pipeline.encoder_identity import component_identity, made_from, tokenizer_identity

CLEANING = "deepfloyd"  # of captions; another would make other states of the same words
_PROGRESS = "progress"  # notes of finished shards, until the manifest holds them


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """buckets: (height, width) in px. captions: the kinds to encode, none for no text. shard_size: records a shard, which is
    also what a kill can cost. strict: stop at the first sample that cannot be encoded instead of naming and counting it."""

    buckets: tuple[tuple[int, int], ...]
    captions: tuple[str, ...] = ()
    max_text_tokens: int = 120
    batch_size: int = 32
    shard_size: int = 1024
    strict: bool = False

    def __post_init__(self):
        for field in ("max_text_tokens", "batch_size", "shard_size"):
            if getattr(self, field) < 1:
                raise UserError(f"{field.replace('_', ' ')} {getattr(self, field)}: must be at least 1")


@dataclasses.dataclass(frozen=True)
class _Work:
    """A shard to be made."""

    file: str
    bucket: tuple[int, int]
    indices: np.ndarray


def identity(source: Source, options: EncodeOptions, vae, text_encoder=None, tokenizer=None) -> dict[str, str]:
    """What a folder of shards is made with: two folders of one identity hold the same records."""
    if options.captions and (text_encoder is None or tokenizer is None):
        raise UserError("captions are to be encoded, but there is no text encoder or no tokenizer")
    for kind in options.captions:
        if kind not in source.caption_kinds:
            raise UserError(f"{source.name} has no captions of kind {kind!r}{nearest(kind, source.caption_kinds)}")
    made = {
        "source": source.name,
        "samples": source.fingerprint,
        "buckets": json.dumps([list(bucket) for bucket in options.buckets]),
        "captions": ",".join(sorted(options.captions)),
        "shard_size": str(options.shard_size),
        "vae": component_identity(vae),
    }
    if options.captions:
        made |= {
            "text_encoder": component_identity(text_encoder),
            "tokenizer": tokenizer_identity(tokenizer),
            "cleaning": CLEANING,
            "max_text_tokens": str(options.max_text_tokens),
        }
    return made


def default_folder(made: Mapping[str, str]) -> pathlib.Path:
    """Where shards of an identity go when nobody says: a folder of the cache that no other set or encoder shares."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in made.items() if k != "shard_size"}, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "encoded" / f"{made['source'].replace(':', '-').replace('/', '-')}-{digest[:16]}"


def ensure(
    source: Source,
    options: EncodeOptions,
    *,
    vae,
    text_encoder=None,
    tokenizer=None,
    folder: str | os.PathLike | None = None,
    folders: Mapping[str, pathlib.Path] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    progress: bool = True,
) -> pathlib.Path:
    """The folder of the source's encoded shards: made where absent, finished where begun, verified where present.

    vae: .encode(images [b, h, w, 3] in [−1, 1]) → (mean, std). text_encoder: .apply(ids [b, l], lengths [b]) → [b, l, c].
    folders: what they were opened from, by 'vae', 'text_encoder' and 'tokenizer': a reader can tell them by their files then.
    Each of process_count processes (JAX's own by default) makes its share of the shards; all return when all are there.
    Raises UserError where the folder holds shards of another identity, or a damaged one, or where processes do not share it.
    """
    if process_index is None or process_count is None:
        process_index, process_count = jax.process_index(), jax.process_count()
    made = identity(source, options, vae, text_encoder, tokenizer)
    folder = pathlib.Path(folder) if folder else default_folder(made)
    notes = folder / _PROGRESS
    finished = _finished(folder, made)
    if (folder / records.MANIFEST).exists() and len(finished) == len(records.Manifest.read(folder).shards):
        return folder

    notes.mkdir(parents=True, exist_ok=True)
    with _alone(notes / f"process-{process_index}"):
        opened = _made_from(folders or {}, vae, text_encoder)
        return _make(folder, made, opened, source, options, vae, text_encoder, tokenizer, process_index, process_count, progress)


def _made_from(folders: Mapping[str, pathlib.Path], vae, text_encoder) -> dict[str, dict[str, str]]:
    dtypes = {part: str(encoder.dtype) for part, encoder in (("vae", vae), ("text_encoder", text_encoder)) if hasattr(encoder, "dtype")}
    return made_from(folders, dtypes)


@contextlib.contextmanager
def _alone(mark: pathlib.Path):
    """Hold a process's mark: of two runs that encode one set into one folder, the second waits for the first, and then finds
    its shards made."""
    with open(mark, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"another run encodes into {mark.parent.parent}; waiting for it")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _make(folder, made, opened, source, options, vae, text_encoder, tokenizer, process_index, process_count, progress) -> pathlib.Path:
    """This process's share of the shards that :func:`ensure` finds missing, once no other run is at it."""
    notes = folder / _PROGRESS
    notes.mkdir(parents=True, exist_ok=True)  # gone, where another run has just finished
    finished = _finished(folder, made)
    if not (notes / "identity.json").exists():
        records.write_json(notes / "identity.json", made)
    _meet(folder, process_index, process_count)
    work = _plan(source, options)
    missing = [shard for shard in work if shard.file not in finished]
    mine = [shard for shard in work[process_index::process_count] if shard.file not in finished]
    done = sum(len(shard.indices) for shard in work) - sum(len(shard.indices) for shard in missing)
    encoder = _Encoder(source, options, vae, text_encoder, tokenizer)
    bar = tqdm(total=len(source), initial=done, unit=" images", desc="encoding", disable=not progress or process_index > 0)
    with bar:
        for shard in mine:
            note = encoder.shard(folder, shard, bar)
            records.write_json(notes / f"{shard.file}.json", dataclasses.asdict(note))
            for key, reason in note.skipped:
                bar.write(f"skipped {key}: {reason}")
            finished[shard.file] = note
    if process_index == 0:
        if len(finished) < len(work):
            bar.write(f"waiting for the {len(work) - len(finished)} shards of the other processes")
        while len(finished) < len(work):
            time.sleep(1)
            finished = _finished(folder, made)
        manifest = records.Manifest(made, tuple(finished[shard.file] for shard in work), opened)
        manifest.write(folder)
        shutil.rmtree(notes, ignore_errors=True)
        for left in folder.glob(".*.partial"):  # of a run that was killed
            left.unlink(missing_ok=True)
        if manifest.skipped:
            bar.write(f"{len(manifest.skipped)} of {len(source)} samples could not be encoded; {folder / records.MANIFEST} names them")
    else:
        while not (folder / records.MANIFEST).exists():
            time.sleep(1)
    return folder


def _meet(folder: pathlib.Path, process_index: int, process_count: int, patience: float = 120) -> None:
    """Wait until every process has been seen in the folder: on a disk of its own, each would wait for the others' shards for ever."""
    notes = folder / _PROGRESS
    (notes / f"process-{process_index}").touch()
    deadline = time.monotonic() + patience
    while not all((notes / f"process-{i}").exists() for i in range(process_count)):
        if (folder / records.MANIFEST).exists():  # the others are done: nothing was left for this one
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} is not shared by all {process_count} processes: let $PIXART_JAX_CACHE name a folder on a shared disk"
            )
        time.sleep(0.2)


def _finished(folder: pathlib.Path, made: Mapping[str, str]) -> dict[str, records.Shard]:
    """File → note of every shard that is there, by the manifest and by the notes of a run that is not at its end.

    A file that is gone will be made again; one that is cut short is a damage that its owner must know of.
    """
    shards: list[records.Shard] = []
    notes = folder / _PROGRESS
    if (folder / records.MANIFEST).exists():
        manifest = records.Manifest.read(folder)
        shards += manifest.shards
        complete = all((folder / shard.file).exists() for shard in shards)
        # How a set was cut into shards matters only to whoever is to make one of them anew.
        records.refuse_other(folder, manifest.identity, {k: v for k, v in made.items() if k != "shard_size" or not complete})
    if (notes / "identity.json").exists():
        records.refuse_other(folder, json.loads((notes / "identity.json").read_text()), made)
        shards += [records.Shard.from_json(json.loads(note.read_text())) for note in sorted(notes.glob("*.array_record.json"))]
    elif not shards and any(folder.glob("*.array_record")):
        raise UserError(f"{folder} holds shards, but nothing says what they were made with: give another folder")
    finished = {shard.file: shard for shard in shards if (folder / shard.file).exists()}
    for shard in finished.values():
        if trouble := records.missing_or_short(folder, shard):
            raise UserError(f"{trouble}; delete the file and run the same command again: only what is missing is made anew")
    return finished


def _plan(source: Source, options: EncodeOptions) -> list[_Work]:
    """All shards, bucket by bucket in the source's order."""
    bucket_of = assign_all(source.sizes(), options.buckets)
    bucket_of = np.maximum(bucket_of, 0)  # an unreadable image belongs to a shard too: the one that will name it
    work = []
    for number, bucket in enumerate(options.buckets):
        members = np.flatnonzero(bucket_of == number)
        for start in range(0, len(members), options.shard_size):
            name = f"{len(work):05d}-{bucket[0]}x{bucket[1]}.array_record"
            work.append(_Work(name, tuple(bucket), members[start : start + options.shard_size]))
    return work


@dataclasses.dataclass
class _Ready:
    """The samples of one batch, decoded: what could not be is in ``skipped``."""

    records: list[tuple[dict[str, np.ndarray], dict[str, str]]]
    pixels: np.ndarray  # float32 [batch, h, w, 3], the last rows repeated where samples are fewer
    texts: list[tuple[int, str, str]]  # (row, caption kind with its number, text)
    skipped: list[tuple[str, str]]


class _Encoder:
    def __init__(self, source: Source, options: EncodeOptions, vae, text_encoder, tokenizer):
        self._source, self._options = source, options
        self._vae, self._text_encoder, self._tokenizer = vae, text_encoder, tokenizer

    def shard(self, folder: pathlib.Path, work: _Work, bar: tqdm) -> records.Shard:
        """Make one shard."""
        longest: dict[str, int] = dict.fromkeys(self._options.captions, 0)
        skipped: list[tuple[str, str]] = []
        lacking: dict[str, list[int]] = {}
        path = folder / work.file
        count = records.write_shard(path, self._records(work, longest, lacking, skipped, bar))
        without = {kind: tuple(places) for kind, places in lacking.items()}
        return records.Shard(work.file, work.bucket, count, path.stat().st_size, records.sha256(path), longest, tuple(skipped), without)

    def _records(self, work: _Work, longest: dict[str, int], lacking: dict[str, list[int]], skipped: list, bar: tqdm) -> Iterator[bytes]:
        size = self._options.batch_size
        batches = [work.indices[i : i + size] for i in range(0, len(work.indices), size)]
        place = 0  # in the shard
        with concurrent.futures.ThreadPoolExecutor(1) as reader:  # decodes the next batch while the device encodes this one
            ready = reader.submit(self._read, batches[0], work.bucket)
            for number, indices in enumerate(batches):
                batch = ready.result()
                if number + 1 < len(batches):
                    ready = reader.submit(self._read, batches[number + 1], work.bucket)
                skipped.extend(batch.skipped)
                for row, (_, metadata) in enumerate(batch.records):
                    for kind in self._options.captions:
                        if f"captions.{kind}" not in metadata:
                            lacking.setdefault(kind, []).append(place + row)
                place += len(batch.records)
                yield from self._encode(batch, longest)
                bar.update(len(indices))

    def _read(self, indices: Sequence[int], bucket: tuple[int, int]) -> _Ready:
        rows, pixels, texts, skipped = [], [], [], []
        for index in indices:
            sample = self._source[int(index)]
            try:
                image = sample.pixels()
                said = sample.said(self._options.captions)
            except UserError as fault:
                if self._options.strict:
                    raise
                skipped.append((sample.key, str(fault)))
                continue
            fitted, how = images.to_bucket(image, bucket)
            arrays = {
                "label": np.int64(sample.label),
                "size": np.array(image.shape[:2], np.int32),
                "fit": np.array(dataclasses.astuple(how), np.int32),
            }
            metadata = {"key": sample.key}
            for kind, found in said.items():
                metadata[f"captions.{kind}"] = json.dumps(found, ensure_ascii=False)
                texts += [(len(rows), f"text.{kind}.{i}", text) for i, text in enumerate(found)]
            rows.append((arrays, metadata))
            pixels.append(fitted)
        missing = self._options.batch_size - len(pixels)
        filler = [pixels[-1] if pixels else np.zeros((*bucket, 3), np.uint8)] * missing
        return _Ready(rows, images.to_model(np.stack(pixels + filler)), texts, skipped)

    def _encode(self, batch: _Ready, longest: dict[str, int]) -> Iterator[bytes]:
        if not batch.records:
            return
        mean, std = self._vae.encode(batch.pixels)  # one shape a bucket, so one executable
        for row, name, states in self._text_states(batch.texts):
            batch.records[row][0][name] = states
            kind = name.split(".", 1)[1].rsplit(".", 1)[0]
            longest[kind] = max(longest[kind], len(states))
        mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        for row, (arrays, metadata) in enumerate(batch.records):
            yield records.pack({**arrays, "mean": mean[row], "std": std[row]}, metadata)

    def _text_states(self, texts: list[tuple[int, str, str]]) -> Iterator[tuple[int, str, np.ndarray]]:
        """(row, name, bfloat16 [l, c] of the real tokens); batches of few widths, so that few executables are made."""
        most, size = self._options.max_text_tokens, self._options.batch_size
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            rows = tokenize(self._tokenizer, [clean(text) for _, _, text in part], most)
            lengths = np.ones(size, np.int32)  # filler is one token long, and so is "" where there is no end mark
            lengths[: len(rows)] = [max(len(row), 1) for row in rows]
            ids = np.full((size, min(most, max(16, 1 << int(lengths.max() - 1).bit_length()))), self._tokenizer.pad_token_id or 0, np.int32)
            for padded, row in zip(ids, rows):
                padded[: len(row)] = row
            states = np.asarray(self._text_encoder.apply(ids, lengths)).astype(ml_dtypes.bfloat16)
            for (row, name, _), length, state in zip(part, lengths, states):
                yield row, name, state[:length]

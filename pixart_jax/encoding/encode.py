"""Images and captions → shards of latent posteriors and text states, made once before training.

The work is cut into shards before it begins: the samples of each bucket in the source's order,
``shard_size`` per shard. A shard's batches, and so its bytes, depend on its samples alone. A
finished shard has a note in progress/ and is never made again, so an interrupted run, started
again, ends with the same files as an uninterrupted one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from pixart_jax.config import MeshConfig
from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.samples import BUCKETS_PNG, assign_all, write_bucket_chart
from pixart_jax.data.sources import Source
from pixart_jax.data.sources.indexed import in_threads
from pixart_jax.encoding.options import Bucket, EncodeOptions
from pixart_jax.encoding.shards import CLEANING, ShardEncoder
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import cache_folder, hash64, locked, upload, write_json
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.pipeline.conditions import Condition
from pixart_jax.pipeline.encoder_identity import component_identity, made_from, tokenizer_identity
from pixart_jax.pipeline.output import AsyncWriter
from pixart_jax.remote_path import REQUESTS, Location, RemotePath, located

FAULTS = "faults.jsonl"  # every skipped sample, beside the manifest
_PROGRESS = "progress"  # notes of finished shards, until the manifest holds them


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """A shard to encode: the samples ``indices`` of the source."""

    file: str
    bucket: Bucket
    indices: np.ndarray


def identity(
    source: Source,
    options: EncodeOptions,
    vae,
    text_encoder=None,
    tokenizer=None,
    condition: Condition | None = None,
) -> dict[str, str]:
    """What a folder of shards is made with: two folders of one identity hold the same records."""
    if options.captions and (text_encoder is None or tokenizer is None):
        raise UserError("captions are to be encoded, but there is no text encoder or no tokenizer")
    for kind in options.captions:
        if kind not in source.caption_kinds:
            close = nearest(kind, source.caption_kinds)
            raise UserError(f"{source.name} has no captions of kind {kind!r}{close}")
    made = {
        "source": source.name,
        "samples": source.fingerprint,
        "buckets": json.dumps([list(bucket) for bucket in options.buckets]),
        "captions": ",".join(sorted(options.captions)),
        "shard_size": str(options.shard_size),
        "vae": component_identity(vae),
    }
    if options.flip:
        made["flip"] = "yes"
    if condition is not None:
        made["condition"] = condition.identity
    if options.captions:
        made |= {
            "text_encoder": component_identity(text_encoder),
            "tokenizer": tokenizer_identity(tokenizer),
            "cleaning": CLEANING,
            "max_text_tokens": str(options.max_text_tokens),
        }
    return made


def default_folder(made: Mapping[str, str]) -> Path:
    """The cache folder of an identity, which no other set or encoder shares."""
    fields = {name: value for name, value in made.items() if name != "shard_size"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    name = made["source"].replace(":", "-").replace("/", "-")
    return cache_folder(keep=True) / "encoded" / f"{name}-{digest[:16]}"


def encode_for_training(source: Source, *, frozen, **options) -> Path:
    """The encoded shards of a source, made with the run's frozen parts where absent
    (training.batches.Encode)."""
    text = {}
    if options["captions"]:
        text = {"text_encoder": frozen.text_encoder(), "tokenizer": frozen.tokenizer}
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    made = encode_dataset(
        source,
        EncodeOptions(**options),
        vae=frozen.vae,
        **text,
        folders={part: frozen.folder(part) for part in ("vae", *text)},
        mesh=mesh if mesh.size > 1 else None,
    )
    return Path(made)  # a folder of the cache


def encode_dataset(
    source: Source,
    options: EncodeOptions,
    *,
    vae,
    text_encoder=None,
    tokenizer=None,
    folder: str | os.PathLike | None = None,
    folders: Mapping[str, Path] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> Location:
    """Return the folder of the source's encoded shards; encode what is missing there.

    vae: .encode(images [b, h, w, 3] in [−1, 1]) → (mean, std). text_encoder: .apply(ids [b, l],
    lengths [b]) → [b, l, c]. folder: of a disk or a bucket. folders: where 'vae', 'text_encoder'
    and 'tokenizer' were opened from, noted in the manifest so that readers can compare files
    instead of weights. mesh: of this process's own devices (None: the first alone). Each of
    process_count processes (by default JAX's) encodes its share of the shards; all return when all
    shards are there. Raises UserError for shards of another identity, damaged ones, and an unshared
    folder.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    condition = options.open_condition(mesh)
    made = identity(source, options, vae, text_encoder, tokenizer, condition)
    folder = located(folder) if folder else default_folder(made)
    notes, manifest = folder / _PROGRESS, folder / records.MANIFEST
    finished = _finished(folder, made)
    if manifest.exists() and len(finished) == len(records.Manifest.read(folder).shards):
        if index == 0:  # of a run that was killed between the manifest and its end
            _remove(notes)
        return _not_empty(folder)

    encoder = ShardEncoder(source, options, vae, text_encoder, tokenizer, mesh, condition)
    notes.mkdir(parents=True, exist_ok=True)
    scratch = scratch_of(folder)
    on_wait = functools.partial(tqdm.write, f"another run encodes into {folder}; waiting for it")
    lock = (notes if isinstance(notes, Path) else scratch) / f"process-{index}"
    with locked(lock, on_wait=on_wait):
        notes.mkdir(parents=True, exist_ok=True)  # removed where another run has just finished
        finished = _finished(folder, made)
        if not (notes / "identity.json").exists():
            _write_json(notes / "identity.json", made)
        wait_for_processes(folder, index, count)
        jobs = plan(source, options)
        share = jobs[index::count]
        bar = tqdm(
            total=sum(len(job.indices) for job in share),
            initial=sum(len(job.indices) for job in share if job.file in finished),
            unit=" images",
            desc="encoding" if count == 1 else f"encoding, process 1 of {count}",
            disable=not progress or index > 0,
        )

        def finish(shard: records.Shard) -> None:
            if isinstance(folder, RemotePath):
                upload(scratch / shard.file, str(folder / shard.file))
                (scratch / shard.file).unlink()
            _write_json(notes / f"{shard.file}.json", dataclasses.asdict(shard))

        with bar, AsyncWriter(finish, limit=1) as writer:  # while the next is encoded
            for job in share:
                if job.file not in finished:
                    writer.put(_encode_shard(scratch, job, encoder, options.captions, bar))
        if index == 0:
            noted = {f"{job.file}.json" for job in jobs if job.file not in finished}
            while noted - {note.name for note in (folder / _PROGRESS).glob("*.json")}:
                time.sleep(1)
            finished = _finished(folder, made)
            dtypes = {"vae": vae, "text_encoder": text_encoder}
            dtypes = {part: str(one.dtype) for part, one in dtypes.items() if hasattr(one, "dtype")}
            shards = tuple(finished[job.file] for job in jobs)
            whole = records.Manifest(made, shards, made_from(folders or {}, dtypes))
            _write_manifest(folder, whole, source, options, progress)
            _remove(notes)
        while not manifest.exists():
            time.sleep(1)
    return _not_empty(folder)


def scratch_of(folder: Location) -> Path:
    """Where shards are written: the folder itself, or one on this disk from which they are
    uploaded."""
    if isinstance(folder, Path):
        return folder
    scratch = cache_folder(keep=True) / "encoded" / f"upload-{hash64(str(folder)):016x}"
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


def _remove(notes: Location) -> None:
    if isinstance(notes, Path):
        shutil.rmtree(notes, ignore_errors=True)
        return
    with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda note: note.unlink(), RemotePath(notes).rglob("*")))


def _not_empty(folder: Location) -> Location:
    manifest = records.Manifest.read(folder)
    if not manifest.samples:
        why = skipped_samples(manifest).summary() or "the source has no sample"
        raise UserError(f"{folder} holds no record: {why}; {FAULTS} there names them")
    return folder


def _encode_shard(
    folder: Path, job: ShardJob, encoder: ShardEncoder, kinds: Sequence[str], bar: tqdm
) -> records.Shard:
    longest: dict[str, int] = dict.fromkeys(kinds, 0)
    skipped: list[tuple[str, str]] = []
    noted: list[tuple[str, str]] = []
    lacking: dict[str, list[int]] = {}

    def on_skip(key: str, reason: str) -> None:
        skipped.append((key, reason))
        bar.write(f"left out: {key}: {reason}", file=sys.stderr)

    def encoded() -> Iterator[bytes]:
        on_note = lambda key, note: noted.append((key, note))  # noqa: E731
        found = encoder.records(job.indices, job.bucket, on_skip, bar.update, on_note)
        for place, (record, tokens) in enumerate(found):
            for kind in kinds:
                if kind in tokens:
                    longest[kind] = max(longest[kind], tokens[kind])
                else:
                    lacking.setdefault(kind, []).append(place)
            yield record

    path = folder / job.file
    count = records.write_shard(path, encoded())
    return records.Shard(
        file=job.file,
        bucket=job.bucket,
        count=count,
        bytes=path.stat().st_size,
        sha256=records.sha256(path),
        longest=longest,
        skipped=tuple(skipped),
        lacking={kind: tuple(places) for kind, places in lacking.items()},
        noted=tuple(noted),
    )


def _write_manifest(
    folder: Location,
    manifest: records.Manifest,
    source: Source,
    options: EncodeOptions,
    progress: bool,
) -> None:
    """Write the skipped samples, the chart of the buckets and, last, the manifest."""
    faults = skipped_samples(manifest, source)
    named = faults.write(folder / FAULTS)
    counts = dict.fromkeys(options.buckets, 0) | manifest.by_bucket
    write_bucket_chart(folder / BUCKETS_PNG, counts, "encoded")
    manifest.write(folder)
    if named and progress:
        tqdm.write(f"{faults.summary()}; {folder / FAULTS} names them", file=sys.stderr)


def skipped_samples(manifest: records.Manifest, source: Source | None = None) -> BadRecords:
    """The samples that the source skipped when it was opened, those that the encoder did, and the
    captions that cleaning emptied or halved."""
    faults, opened = BadRecords(), getattr(source, "faults", BadRecords())
    faults.extend(opened)
    faults.unread.update(opened.unread)
    for repaired in (False, True):
        for shard in manifest.shards:
            for key, reason in shard.noted if repaired else shard.skipped:
                kind, _, detail = reason.partition(": ")
                faults.add(key, kind, detail, repaired)
    return faults


def wait_for_processes(folder: Location, index: int, count: int, timeout: float = 120) -> None:
    """Wait until every process has been seen in the folder: with a disk of its own, each would wait
    forever for the others' shards. Raises UserError after ``timeout`` seconds."""
    notes = folder / _PROGRESS
    (notes / f"process-{index}").touch()
    deadline = time.monotonic() + timeout
    named = {f"process-{i}" for i in range(count)}
    while named - {path.name for path in (folder / _PROGRESS).glob("process-*")}:
        if (folder / records.MANIFEST).exists():  # the others are done, nothing was left to do
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} is not shared by {count} processes: let $PIXART_JAX_CACHE be"
            )
        time.sleep(0.2)


def _finished(folder: Location, made: Mapping[str, str]) -> dict[str, records.Shard]:
    """Finished shards by file, from the manifest and from the notes of an unfinished run.

    A file that is gone is made again; one of another size raises UserError.
    """
    shards: list[records.Shard] = []
    notes, there = folder / _PROGRESS, records.sizes(folder)
    if (folder / records.MANIFEST).exists():
        manifest = records.Manifest.read(folder)
        shards += manifest.shards
        complete = all(shard.file in there for shard in shards)
        # The size of shards matters only where one of them has to be made again.
        expected = {k: v for k, v in made.items() if k != "shard_size" or not complete}
        records.check_identity(folder, manifest.identity, expected)
    if (notes / "identity.json").exists():
        records.check_identity(folder, json.loads((notes / "identity.json").read_text()), made)
        found: list[Location] = sorted(notes.glob("*.array_record.json"))
        texts = in_threads(lambda note: note.read_text(), found, "what is finished", "shards")
        shards += [records.Shard.from_json(json.loads(text)) for text in texts]
    elif not shards and there:
        raise UserError(
            f"{folder} holds shards, but nothing says what they were made with: give another folder"
        )
    finished = {shard.file: shard for shard in shards if shard.file in there}
    for shard in finished.values():
        if trouble := records.quick_check(folder, shard, there):
            raise UserError(f"{trouble}; delete the file and run the same command again")
    return finished


def plan(source: Source, options: EncodeOptions) -> list[ShardJob]:
    """All shards, bucket by bucket in the source's order."""
    # an unreadable image belongs to a shard too, which then names it
    bucket_of = np.maximum(assign_all(source.sizes(), options.buckets), 0)
    jobs: list[ShardJob] = []
    for number, (height, width) in enumerate(options.buckets):
        members = np.flatnonzero(bucket_of == number)
        for start in range(0, len(members), options.shard_size):
            name = f"{len(jobs):05d}-{height}x{width}.array_record"
            part = members[start : start + options.shard_size]
            jobs.append(ShardJob(name, (height, width), part))
    return jobs


def _write_json(path: Location, value: Any) -> None:
    write_json(path, value, indent=1, sort_keys=True)

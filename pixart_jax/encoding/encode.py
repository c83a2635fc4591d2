"""Pictures and captions → shards of latents' posterior and text states, made once so that training
never waits.

The work is cut into shards before it begins: the samples of each bucket in the source's order, so
many a shard. A shard's batches, and so its bytes, depend on nothing but its samples; a shard that
is finished is noted in progress/ and never made again. So an interrupted run, started again, ends
with the very files of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from pixart_jax.data import bucket_chart, records
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.samples import assign_all
from pixart_jax.data.sources import Source
from pixart_jax.encoding.shard_encoder import CLEANING, ShardEncoder
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import cache_folder
from pixart_jax.pipeline.encoder_identity import component_identity, made_from, tokenizer_identity

FAULTS = "faults.jsonl"  # every sample that was left out, beside the manifest
_PROGRESS = "progress"  # notes of finished shards, until the manifest holds them


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """buckets: (height, width) in px. captions: the kinds to encode, none for no text. shard_size:
    records a shard, which is also what a kill can cost. batch_size: pictures that a device encodes
    at once. flip: each picture mirrored too, as a second posterior of its record. strict: stop at
    the first sample that cannot be encoded instead of naming and counting it."""

    buckets: tuple[tuple[int, int], ...]
    captions: tuple[str, ...] = ()
    max_text_tokens: int = 120
    batch_size: int = 32
    shard_size: int = 1024
    flip: bool = False
    strict: bool = False

    def __post_init__(self):
        for field in ("max_text_tokens", "batch_size", "shard_size"):
            if getattr(self, field) < 1:
                raise UserError(
                    f"{field.replace('_', ' ')} {getattr(self, field)}: must be at least 1"
                )


@dataclasses.dataclass(frozen=True)
class ShardJob:
    """A shard to be made."""

    file: str
    bucket: tuple[int, int]
    indices: np.ndarray


def identity(
    source: Source, options: EncodeOptions, vae, text_encoder=None, tokenizer=None
) -> dict[str, str]:
    """What a folder of shards is made with: two folders of one identity hold the same records."""
    if options.captions and (text_encoder is None or tokenizer is None):
        raise UserError("captions are to be encoded, but there is no text encoder or no tokenizer")
    for kind in options.captions:
        if kind not in source.caption_kinds:
            raise UserError(
                f"{source.name} has no captions of kind "
                f"{kind!r}{nearest(kind, source.caption_kinds)}"
            )
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
    if options.captions:
        made |= {
            "text_encoder": component_identity(text_encoder),
            "tokenizer": tokenizer_identity(tokenizer),
            "cleaning": CLEANING,
            "max_text_tokens": str(options.max_text_tokens),
        }
    return made


def default_folder(made: Mapping[str, str]) -> pathlib.Path:
    """Where shards of an identity go when nobody says: a folder of the cache that no other set or
    encoder shares."""
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in made.items() if k != "shard_size"}, sort_keys=True).encode()
    ).hexdigest()
    return (
        cache_folder()
        / "encoded"
        / f"{made['source'].replace(':', '-').replace('/', '-')}-{digest[:16]}"
    )


def encode_dataset(
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
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = True,
) -> pathlib.Path:
    """The folder of the source's encoded shards: made where absent, finished where begun, verified
    where present.

    vae: .encode(images [b, h, w, 3] in [−1, 1]) → (mean, std). text_encoder: .apply(ids [b, l],
    lengths [b]) → [b, l, c].
    folders: what they were opened from, by 'vae', 'text_encoder' and 'tokenizer': a reader can tell
    them by their files then.
    mesh: of this process's own devices, all of which encode (None: the first alone). Each of
    process_count processes (JAX's own by default) makes its share of the shards; all return when
    all are there. Raises UserError where the folder holds shards of another identity, or a damaged
    one, or where processes do not share it.
    """
    if process_index is None or process_count is None:
        process_index, process_count = jax.process_index(), jax.process_count()
    made = identity(source, options, vae, text_encoder, tokenizer)
    folder = pathlib.Path(folder) if folder else default_folder(made)
    notes = folder / _PROGRESS
    finished = _finished(folder, made)
    if (folder / records.MANIFEST).exists() and len(finished) == len(
        records.Manifest.read(folder).shards
    ):
        if process_index == 0:
            # of a run that was killed between the manifest and its end
            shutil.rmtree(notes, ignore_errors=True)
        return folder

    notes.mkdir(parents=True, exist_ok=True)
    with _alone(notes / f"process-{process_index}"):
        job = _Job(folder, made, _made_from(folders or {}, vae, text_encoder), source, options)
        encoder = ShardEncoder(
            source,
            options.captions,
            options.max_text_tokens,
            options.batch_size,
            vae,
            text_encoder,
            tokenizer,
            flip=options.flip,
            mesh=mesh,
            strict=options.strict,
        )
        return job.run(encoder, process_index, process_count, progress)


def _made_from(folders: Mapping[str, pathlib.Path], vae, text_encoder) -> dict[str, dict[str, str]]:
    dtypes = {
        part: str(encoder.dtype)
        for part, encoder in (("vae", vae), ("text_encoder", text_encoder))
        if hasattr(encoder, "dtype")
    }
    return made_from(folders, dtypes)


@contextlib.contextmanager
def _alone(mark: pathlib.Path):
    """Hold a process's mark: of two runs that encode one set into one folder, the second waits for
    the first, and then finds its shards made."""
    with open(mark, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"another run encodes into {mark.parent.parent}; waiting for it")
            fcntl.flock(held, fcntl.LOCK_EX)
        yield


@dataclasses.dataclass
class _Job:
    """The shards that :func:`ensure` finds missing, once no other run is at them."""

    folder: pathlib.Path
    made: Mapping[str, str]
    made_from: Mapping[str, Mapping[str, str]]
    source: Source
    options: EncodeOptions

    @property
    def notes(self) -> pathlib.Path:
        return self.folder / _PROGRESS

    def run(
        self, encoder: ShardEncoder, process_index: int, process_count: int, progress: bool
    ) -> pathlib.Path:
        """Make this process's share, and wait for the others'."""
        self.notes.mkdir(parents=True, exist_ok=True)  # gone, where another run has just finished
        finished = _finished(self.folder, self.made)
        if not (self.notes / "identity.json").exists():
            records.write_json(self.notes / "identity.json", self.made)
        _meet(self.folder, process_index, process_count)
        work = plan(self.source, self.options)
        mine = [shard for shard in work[process_index::process_count] if shard.file not in finished]
        others = {
            shard.file: len(shard.indices) for shard in work if shard.file not in finished
        } | {shard.file: 0 for shard in mine}
        done = sum(len(shard.indices) for shard in work if shard.file in finished)
        bar = tqdm(
            total=len(self.source),
            initial=done,
            unit=" images",
            desc="encoding",
            disable=not progress or process_index > 0,
        )
        with bar:
            for shard in mine:
                note = self._shard(encoder, shard, bar)
                records.write_json(self.notes / f"{shard.file}.json", dataclasses.asdict(note))
                finished[shard.file] = note
                self._tell_others(others, bar)
            if process_index == 0:
                while len(finished) < len(work):  # the last shards of the other processes
                    time.sleep(1)
                    finished = _finished(self.folder, self.made)
                    self._tell_others(others, bar)
        if process_index == 0:
            self._conclude([finished[shard.file] for shard in work], progress)
        while not (self.folder / records.MANIFEST).exists():
            time.sleep(1)
        return self.folder

    def _tell_others(self, others: dict[str, int], bar: tqdm) -> None:
        """Count what other processes have finished since they were last asked, so that the bar is
        that of all."""
        for file in [
            file
            for file, count in others.items()
            if count and (self.notes / f"{file}.json").exists()
        ]:
            bar.update(others.pop(file))

    def _shard(self, encoder: ShardEncoder, work: ShardJob, bar: tqdm) -> records.Shard:
        """Make one shard."""
        longest: dict[str, int] = dict.fromkeys(self.options.captions, 0)
        skipped: list[tuple[str, str]] = []
        lacking: dict[str, list[int]] = {}

        def left_out(key: str, reason: str) -> None:
            skipped.append((key, reason))
            bar.write(f"left out: {key}: {reason}", file=sys.stderr)

        def packed() -> Iterator[bytes]:
            for place, (record, tokens) in enumerate(
                encoder.records(work.indices, work.bucket, left_out, bar.update)
            ):
                for kind in self.options.captions:
                    if kind in tokens:
                        longest[kind] = max(longest[kind], tokens[kind])
                    else:
                        lacking.setdefault(kind, []).append(place)
                yield record

        path = self.folder / work.file
        count = records.write_shard(path, packed())
        without = {kind: tuple(places) for kind, places in lacking.items()}
        return records.Shard(
            work.file,
            work.bucket,
            count,
            path.stat().st_size,
            records.sha256(path),
            longest,
            tuple(skipped),
            without,
        )

    def _conclude(self, shards: Sequence[records.Shard], progress: bool) -> None:
        """The faults, the picture of the buckets, and, last, the manifest that makes them a set."""
        manifest = records.Manifest(self.made, tuple(shards), self.made_from)
        faults = faults_of(manifest, self.source)
        lines = [
            json.dumps(dataclasses.asdict(fault), ensure_ascii=False) + "\n" for fault in faults
        ]
        if lines:
            records.write_text(self.folder / FAULTS, "".join(lines))
        else:
            (self.folder / FAULTS).unlink(missing_ok=True)
        bucket_chart.write(
            self.folder / bucket_chart.BUCKETS_PNG,
            dict.fromkeys(self.options.buckets, 0) | manifest.by_bucket,
            "encoded",
        )
        manifest.write(self.folder)
        shutil.rmtree(self.notes, ignore_errors=True)
        for left in self.folder.glob(".*.partial*"):  # of a run that was killed
            left.unlink(missing_ok=True)
        if faults and progress:
            tqdm.write(f"{faults.summary()}; {self.folder / FAULTS} names them", file=sys.stderr)


def faults_of(manifest: records.Manifest, source: Source | None = None) -> BadRecords:
    """What was left out: by the source when it was opened, and by the encoder."""
    faults = BadRecords()
    faults.extend(getattr(source, "faults", ()))
    for key, reason in manifest.skipped:
        kind, _, detail = reason.partition(": ")
        faults.add(key, kind, detail)
    return faults


def _meet(
    folder: pathlib.Path, process_index: int, process_count: int, patience: float = 120
) -> None:
    """Wait until every process has been seen in the folder: on a disk of its own, each would wait
    for the others' shards for ever."""
    notes = folder / _PROGRESS
    (notes / f"process-{process_index}").touch()
    deadline = time.monotonic() + patience
    while not all((notes / f"process-{i}").exists() for i in range(process_count)):
        # the others are done: nothing was left for this one
        if (folder / records.MANIFEST).exists():
            return
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} is not shared by all {process_count} processes: let $PIXART_JAX_CACHE "
                "name a folder on a shared disk"
            )
        time.sleep(0.2)


def _finished(folder: pathlib.Path, made: Mapping[str, str]) -> dict[str, records.Shard]:
    """File → note of every shard that is there, by the manifest and by the notes of a run that is
    not at its end.

    A file that is gone will be made again; one that is cut short is a damage that its owner must
    know of.
    """
    shards: list[records.Shard] = []
    notes = folder / _PROGRESS
    if (folder / records.MANIFEST).exists():
        manifest = records.Manifest.read(folder)
        shards += manifest.shards
        complete = all((folder / shard.file).exists() for shard in shards)
        # How a set was cut into shards matters only to whoever is to make one of them anew.
        records.check_identity(
            folder,
            manifest.identity,
            {k: v for k, v in made.items() if k != "shard_size" or not complete},
        )
    if (notes / "identity.json").exists():
        records.check_identity(folder, json.loads((notes / "identity.json").read_text()), made)
        shards += [
            records.Shard.from_json(json.loads(note.read_text()))
            for note in sorted(notes.glob("*.array_record.json"))
        ]
    elif not shards and any(folder.glob("*.array_record")):
        raise UserError(
            f"{folder} holds shards, but nothing says what they were made with: give another folder"
        )
    finished = {shard.file: shard for shard in shards if (folder / shard.file).exists()}
    for shard in finished.values():
        if trouble := records.quick_check(folder, shard):
            raise UserError(
                f"{trouble}; delete the file and run the same command again: only what is missing "
                "is made anew"
            )
    return finished


def plan(source: Source, options: EncodeOptions) -> list[ShardJob]:
    """All shards, bucket by bucket in the source's order."""
    bucket_of = assign_all(source.sizes(), options.buckets)
    # an unreadable image belongs to a shard too: the one that will name it
    bucket_of = np.maximum(bucket_of, 0)
    work = []
    for number, bucket in enumerate(options.buckets):
        members = np.flatnonzero(bucket_of == number)
        for start in range(0, len(members), options.shard_size):
            name = f"{len(work):05d}-{bucket[0]}x{bucket[1]}.array_record"
            work.append(ShardJob(name, tuple(bucket), members[start : start + options.shard_size]))
    return work

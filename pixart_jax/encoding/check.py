"""``encode --check``: compare encoded shards with their checksums, and with what the encoders make
of the source today."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import Source
from pixart_jax.encoding.encode import FAULTS, plan
from pixart_jax.encoding.options import EncodeOptions
from pixart_jax.encoding.shards import ShardEncoder
from pixart_jax.errors import UserError
from pixart_jax.files import hash64

# of the largest value: another precision or mesh stays below it, another encoder does not
TOLERANCE = 0.02


def check(folder: Path) -> None:
    """Compare every byte with its checksum and every key with all others; print what is wrong, or a
    summary. Raises UserError where a shard is damaged or missing, or a key occurs twice."""
    samples, damaged = records.Manifest.read(folder).samples, 0
    with tqdm(total=samples, unit=" records", desc="checking", disable=None) as bar:
        for shard, trouble in records.check(folder):
            if trouble:
                damaged += 1
                bar.write(trouble, file=sys.stderr)
            bar.update(shard.count)
    if damaged:
        raise UserError(
            f"{damaged} of the shards in {folder} are damaged: delete them and encode again, only "
            "they are made anew"
        )
    stored, seen, twice = records.Records(folder), set(), 0
    for index in range(samples):
        key = records.decode_record(stored.bytes(index), ())[1]["key"]
        if hash64(key) in seen:
            number, place = stored.shard_of(index)
            where = f"{stored.manifest.shards[number].file}, record {place}"
            print(f"{where}: key twice ({key})", file=sys.stderr)
            twice += 1
        seen.add(hash64(key))
    if twice:
        raise UserError(
            f"{twice} of the records in {folder} have a key that another one has: two pictures go "
            "by one name"
        )
    print(f"no damage: {summary(folder)}")


def reencode_and_compare(
    folder: Path, source: Source, options: EncodeOptions, encoder: ShardEncoder, count: int
) -> str:
    """Encode ``count`` records again, the first ones of shards all over the set, and return a line
    on how far they are from what is stored. Raises UserError where they are too far.

    The folder's identity must be that of the source and the encoders.
    """
    stored, jobs = records.Records(folder), plan(source, options)
    shards = stored.manifest.shards
    starts = np.cumsum([0, *(shard.count for shard in shards)])
    filled = np.flatnonzero([shard.count for shard in shards])
    chosen = filled[np.unique(np.linspace(0, len(filled) - 1, min(count, len(filled))).astype(int))]
    largest = {"posterior": 0.0, "text states": 0.0}
    same = compared = 0
    for number in chosen:
        shard, job = shards[number], jobs[number]
        skipped = {key for key, _ in shard.skipped}
        kept = (i for i in job.indices if not skipped or source[int(i)].key not in skipped)
        some = min(-(-count // len(chosen)), shard.count, count - compared)
        for place, index in enumerate(itertools.islice(kept, some)):
            ((after, _),) = encoder.records([index], job.bucket, _refuse)
            before = stored.bytes(int(starts[number]) + place)
            compared += 1
            same += after == before
            _compare(before, after, largest, f"{shard.file}, record {place}")
    line = f"{compared} records encoded again: {same} equal to the byte"
    if same < compared:
        parts = (f"{name} differ by {value:.2g}" for name, value in largest.items())
        line += f"; {', '.join(parts)} of their largest value at most"
    if max(largest.values()) > TOLERANCE:
        raise UserError(
            f"{line}: what lies in {folder} is not what these encoders make of {source.name}"
        )
    return line


def _refuse(key: str, reason: str) -> None:
    raise UserError(f"{key} was encoded and now cannot be: {reason}")


def _compare(before: bytes, after: bytes, largest: dict[str, float], where: str) -> None:
    """Raise UserError where two records differ in more than posteriors and states; note in
    ``largest`` by how much these do."""
    old, new = records.decode_record(before)[0], records.decode_record(after)[0]
    if set(old) != set(new):
        names, now = ", ".join(sorted(old)), ", ".join(sorted(new))
        raise UserError(f"{where} holds {names}, but encoding it again gives {now}")
    for name, value in old.items():
        computed = name.startswith(("text.", "mean", "std", "control_"))
        if value.shape != new[name].shape or not (computed or np.array_equal(value, new[name])):
            raise UserError(f"{where}: {name} is not what encoding it again gives")
        if computed:
            part = "text states" if name.startswith("text.") else "posterior"
            one, two = value.astype(np.float32), new[name].astype(np.float32)
            share = float(np.abs(one - two).max() / max(np.abs(one).max(), 1e-12))
            largest[part] = max(largest[part], share)


def summary(folder: Path) -> str:
    """Two lines: what a folder holds, and what of the source is in it."""
    manifest = records.Manifest.read(folder)
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    buckets = ", ".join(f"{h}×{w}: {n}" for (h, w), n in manifest.by_bucket.items())
    mirrored = ", each mirrored too" if manifest.identity.get("flip") == "yes" else ""
    report = BadRecords.read(folder / FAULTS).report(manifest.samples)
    return (
        f"{manifest.samples} records ({buckets}){mirrored} in {len(manifest.shards)} "
        f"shards, {size:.1f} MiB: {folder}\n{report}"
    )

"""``encode --check``: compare encoded shards with their checksums, and with what the encoders make
of the source today."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import Source
from pixart_jax.encoding.encode import plan, skipped_samples
from pixart_jax.encoding.options import EncodeOptions
from pixart_jax.encoding.shards import ShardEncoder
from pixart_jax.errors import UserError
from pixart_jax.files import hash64

# of the largest value: another precision or mesh stays below it, another encoder does not
TOLERANCE = 0.02


def check(folder: Path) -> None:
    """Compare every byte with its checksum and every key with all others; print what is wrong, or a
    summary. Raises UserError where a shard is damaged or missing, or a key occurs twice."""
    manifest = records.Manifest.read(folder)
    faults, damaged = BadRecords(), 0
    seen: set[int] = set()
    with tqdm(total=manifest.samples, unit=" records", desc="checking", disable=None) as bar:
        for shard, trouble in records.check(folder):
            if trouble:
                damaged += 1
                bar.write(trouble, file=sys.stderr)
            else:
                for place, key in enumerate(_keys(folder / shard.file, shard.count)):
                    if hash64(key) in seen:
                        faults.add(f"{shard.file}, record {place}", "key twice", key)
                    seen.add(hash64(key))
            bar.update(shard.count)
    for fault in faults:
        print(fault, file=sys.stderr)
    if damaged:
        raise UserError(
            f"{damaged} of the shards in {folder} are damaged: delete them and encode again, only "
            "they are made anew"
        )
    if faults:
        raise UserError(
            f"{len(faults)} of the records in {folder} have a key that another one has: two "
            "pictures go by one name"
        )
    print(f"no damage: {summary(folder)}")


def _keys(path: Path, count: int):
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    for start in range(0, count, 64):
        for record in reader.read(start, min(start + 64, count)):
            yield records.decode_record(record, ())[1]["key"]


def reencode_and_compare(
    folder: Path, source: Source, options: EncodeOptions, encoder: ShardEncoder, count: int
) -> str:
    """Encode ``count`` records again, spread over the shards, and return a line on how far they are
    from what is stored. Raises UserError where they are too far.

    The folder's identity must be that of the source and the encoders.
    """
    stored = records.Records(folder)
    shards = stored.manifest.shards
    filled = [number for number, shard in enumerate(shards) if shard.count]
    spread = np.linspace(0, len(filled) - 1, min(count, len(filled))).astype(int)
    chosen = [filled[at] for at in np.unique(spread)]
    jobs, starts = plan(source, options), np.cumsum([0, *(shard.count for shard in shards)])
    largest = {"posterior": 0.0, "text states": 0.0}
    same = compared = 0
    for number in chosen:
        skipped = {key for key, _ in shards[number].skipped}
        indices = iter(jobs[number].indices)
        # the first few records of each chosen shard
        for place in range(min(-(-count // len(chosen)), shards[number].count, count - compared)):
            index = next(indices)
            while skipped and source[int(index)].key in skipped:
                index = next(indices)
            ((after, _),) = encoder.records([index], jobs[number].bucket, _refuse)
            before = stored.bytes(int(starts[number]) + place)
            compared += 1
            same += after == before
            _compare(before, after, largest, f"{shards[number].file}, record {place}")
    line = f"{compared} records encoded again: {same} equal to the byte"
    if same < compared:
        line += "".join(
            f"{', ' if n else '; '}{name} differ by {value:.2g} of their largest value at most"
            for n, (name, value) in enumerate(largest.items())
        )
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
        computed = name.startswith(("text.", "mean", "std"))
        if value.shape != new[name].shape or not (computed or np.array_equal(value, new[name])):
            raise UserError(f"{where}: {name} is not what encoding it again gives")
        if computed:
            part = "text states" if name.startswith("text.") else "posterior"
            one, two = value.astype(np.float32), new[name].astype(np.float32)
            share = float(np.abs(one - two).max() / max(np.abs(one).max(), 1e-12))
            largest[part] = max(largest[part], share)


def summary(folder: Path) -> str:
    """One line on what a folder holds."""
    manifest = records.Manifest.read(folder)
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    buckets = ", ".join(f"{h}×{w}: {n}" for (h, w), n in manifest.by_bucket.items())
    mirrored = ", each mirrored too" if manifest.identity.get("flip") == "yes" else ""
    left_out = f", {skipped_samples(manifest).summary()}," if manifest.skipped else ""
    return (
        f"{manifest.samples} records ({buckets}){mirrored}{left_out} in {len(manifest.shards)} "
        f"shards, {size:.1f} MiB: {folder}"
    )

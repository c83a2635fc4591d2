"""``encode --check``: whether encoded shards are what was written, and whether the encoders still
write them."""

from __future__ import annotations

import hashlib
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from pixart_jax.data import records
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import Source
from pixart_jax.encoding.encode import EncodeOptions, faults_of, plan
from pixart_jax.encoding.shard_encoder import ShardEncoder
from pixart_jax.errors import UserError

# of the largest value: another precision or mesh stays below it, another encoder does not
FARTHEST = 0.02


def check(folder: pathlib.Path | None) -> int:
    """Compare every byte with its checksum and every key with all others; name what is wrong, and
    say what is there.

    Exit status 0. UserError, and so exit status 2, where a shard is damaged or missing or a key
    stands twice.
    """
    if folder is None:
        raise UserError("--check needs --out FOLDER, the shards to check")
    manifest = records.Manifest.read(folder)
    faults, damaged, seen = BadRecords(), 0, {}
    with tqdm(total=manifest.samples, unit=" records", desc="checking", disable=None) as bar:
        for shard, trouble in records.check(folder):
            if trouble:
                damaged += 1
                bar.write(trouble, file=sys.stderr)
            else:
                for place, key in enumerate(_keys(folder / shard.file, shard.count)):
                    digest = hashlib.blake2b(key.encode(), digest_size=12).digest()
                    if digest in seen:
                        faults.add(f"{shard.file}, record {place}", "key twice", key)
                    seen[digest] = None
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
    return 0


def _keys(path: pathlib.Path, count: int) -> Iterator[str]:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    for start in range(0, count, 64):
        for record in reader.read(start, min(start + 64, count)):
            yield records.decode_record(record, ())[1]["key"]


def reencode_and_compare(
    folder: pathlib.Path, source: Source, options: EncodeOptions, encoder: ShardEncoder, count: int
) -> str:
    """Encode ``count`` records anew, spread over the shards, and say in a line how far they are
    from what is stored.

    The folder's identity must be that of the source and the encoders. UserError where they are too
    far.
    """
    stored = records.Records(folder)
    shards = [number for number, shard in enumerate(stored.manifest.shards) if shard.count]
    chosen = (
        sorted({shards[int(at)] for at in np.linspace(0, len(shards) - 1, min(count, len(shards)))})
        if shards
        else []
    )
    work, starts = (
        plan(source, options),
        np.cumsum([0, *(shard.count for shard in stored.manifest.shards)]),
    )
    farthest: dict[str, float] = {"posterior": 0.0, "text states": 0.0}
    same, compared = 0, 0
    for number in chosen:
        skipped = {key for key, _ in stored.manifest.shards[number].skipped}
        kept = (
            index
            for index in work[number].indices
            if not skipped or source[int(index)].key not in skipped
        )
        # A few records of each chosen shard, its first ones.
        for place in range(min(-(-count // len(chosen)), stored.manifest.shards[number].count)):
            if compared == count:
                break
            index = int(next(kept))
            (made,) = (
                record for record, _ in encoder.records([index], work[number].bucket, _refuse)
            )
            before = stored.bytes(int(starts[number]) + place)
            compared += 1
            same += made == before
            _compare(
                records.decode_record(before)[0],
                records.decode_record(made)[0],
                farthest,
                f"{stored.manifest.shards[number].file}, record {place}",
            )
    said = ", ".join(
        f"{name} differ by {value:.2g} of their largest value at most"
        for name, value in farthest.items()
    )
    line = f"{compared} records encoded again: {same} equal to the byte" + (
        "" if same == compared else f"; {said}"
    )
    if max(farthest.values()) > FARTHEST:
        raise UserError(
            f"{line}: what lies in {folder} is not what these encoders make of {source.name}"
        )
    return line


def _refuse(key: str, reason: str) -> None:
    raise UserError(f"{key} was encoded and now cannot be: {reason}")


def _compare(before: dict, after: dict, farthest: dict[str, float], where: str) -> None:
    if set(before) != set(after):
        raise UserError(
            f"{where} holds {', '.join(sorted(before))}, but encoding it again gives "
            f"{', '.join(sorted(after))}"
        )
    for name, value in before.items():
        name_of = (
            "text states"
            if name.startswith("text.")
            else "posterior"
            if name.startswith(("mean", "std"))
            else None
        )
        if name_of is None or value.shape != after[name].shape:
            if value.shape != after[name].shape or not np.array_equal(value, after[name]):
                raise UserError(f"{where}: {name} is not what encoding it again gives")
            continue
        one, two = value.astype(np.float32), after[name].astype(np.float32)
        farthest[name_of] = max(
            farthest[name_of], float(np.abs(one - two).max() / max(np.abs(one).max(), 1e-12))
        )


def summary(folder: pathlib.Path) -> str:
    """One line on what a folder holds."""
    manifest = records.Manifest.read(folder)
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    buckets = ", ".join(f"{h}×{w}: {n}" for (h, w), n in manifest.by_bucket.items())
    mirrored = ", each mirrored too" if manifest.identity.get("flip") == "yes" else ""
    left_out = f", {faults_of(manifest).summary()}," if manifest.skipped else ""
    return (
        f"{manifest.samples} records ({buckets}){mirrored}{left_out} in {len(manifest.shards)} "
        f"shards, {size:.1f} MiB: {folder}"
    )

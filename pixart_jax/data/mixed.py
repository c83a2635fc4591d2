"""Several sets of training samples as one, each drawn with its share.

An epoch is as long as all the sets together, N samples. Of a set with n samples and share w it
shows w·N, so each of its samples r = w·N / n times in the mean: ⌊r⌋ times for certain, and the rest
by chance, bucket by bucket. For that the line of the set's samples is cut into as many equal
stretches as there are places left over, and each place shows the sample that the row's draw meets
in its stretch. So no sample is preferred for ever, two places of an epoch may share the one on
their border and no other, and what a step shows is a function of seed and step alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pixart_jax.data.samples import Samples
from pixart_jax.errors import UserError

# Of an identity, what may differ between sets that are trained on together.
_OF_THE_SET = ("source", "samples", "shard_size", "captions", "buckets", "flip")


class MixedSamples:
    """parts: what to read, each with rows of one form. shares: positive, adding up to 1.

    Parts with texts are padded to one length. UserError where a part has nothing to train on, or
    where records were made by different encoders.
    """

    def __init__(self, parts: Sequence[Samples], shares: Sequence[float], names: Sequence[str]):
        _refuse_unlike(parts, names)
        self.parts = tuple(parts)
        lengths = [part.length for part in parts if getattr(part, "length", 0)]
        if lengths:
            self.length = max(lengths)
            for part in parts:
                part.length = self.length
        self.buckets = tuple(dict.fromkeys(bucket for part in parts for bucket in part.buckets))
        self._bucket_in = [
            {self.buckets.index(bucket): i for i, bucket in enumerate(part.buckets)}
            for part in parts
        ]
        counts = [int((part.bucket_of >= 0).sum()) for part in parts]
        for name, count in zip(names, counts, strict=True):
            if not count:
                raise UserError(f"{name}, a part of a mixture, has no sample to train on")
        whole = sum(counts)
        slots: list[tuple[np.ndarray, ...]] = []
        members, at = [], 0
        for number, (part, share, count) in enumerate(zip(parts, shares, counts, strict=True)):
            rate = share * whole / count
            for own, bucket in enumerate(part.buckets):
                inside = np.flatnonzero(part.bucket_of == own)
                starts, ends = _places(len(inside), rate)
                slots.append(
                    (
                        starts + at,
                        ends + at,
                        np.full(len(starts), number),
                        np.full(len(starts), self.buckets.index(bucket)),
                    )
                )
                members.append(inside)
                at += len(inside)
        self._members = np.concatenate(members)
        self._starts, self._ends, self._part = (
            np.concatenate([slot[i] for slot in slots]) for i in range(3)
        )
        self.bucket_of = np.concatenate([slot[3] for slot in slots]).astype(np.int16)

    def __len__(self) -> int:
        return len(self.bucket_of)

    def chosen(
        self, indices: np.ndarray, draws: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(number of the part, number of the sample in it, a draw in [0, 1) for what is chosen of
        that sample) of each place of the plan. A place that shows one sample for certain hands its
        draw on as it is."""
        draws = np.asarray(draws, np.float64)
        starts, ends = self._starts[indices], self._ends[indices]
        which = np.minimum(np.floor(starts + draws * (ends - starts)), np.ceil(ends) - 1).astype(
            np.int64
        )
        certain = (ends - starts == 1) & (starts == which)
        return self._part[indices], self._members[which], np.where(certain, draws, _another(draws))

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket."""
        parts, samples, rests = self.chosen(np.asarray(indices, np.int64), draws)
        rows = [np.flatnonzero(parts == number) for number in range(len(self.parts))]
        found = [
            part.read(samples[mine], own[bucket], rests[mine])
            for part, own, mine in zip(self.parts, self._bucket_in, rows, strict=True)
            if len(mine)
        ]
        if len(found) == 1:
            return found[0]
        back = np.argsort(np.concatenate(rows), kind="stable")
        return {name: np.concatenate([batch[name] for batch in found])[back] for name in found[0]}


def _another(draws: np.ndarray) -> np.ndarray:
    """float64 in [0, 1): of each draw one that is as good as independent of it, in all its digits
    (the finaliser of SplitMix64)."""
    bits = (draws * 2.0**53).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _places(count: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """float64 (begin, end) of the stretch that each place of an epoch chooses from; sample i is [i,
    i + 1)."""
    certain, left = int(rate), round((rate - int(rate)) * count)
    alone = np.tile(np.arange(count, dtype=np.float64), certain)
    edges = np.arange(left + 1) * (count / max(left, 1))
    edges[left] = count if left else 0
    return np.concatenate([alone, edges[:left]]), np.concatenate([alone + 1, edges[1 : left + 1]])


def _refuse_unlike(parts: Sequence[Samples], names: Sequence[str]) -> None:
    made = [getattr(part, "identity", None) for part in parts]
    for identity, name in zip(made[1:], names[1:], strict=True):
        first = made[0]
        if (first is None) != (identity is None):
            raise UserError(
                f"{names[0]} and {name} cannot be mixed: only one of them says which encoders "
                "made it"
            )
        for field in sorted({*(first or {}), *(identity or {})} - set(_OF_THE_SET)):
            if field in first and field in identity and first[field] != identity[field]:
                one, other = first[field][:12], identity[field][:12]
                raise UserError(
                    f"{names[0]} and {name} cannot be mixed: {field} is {one} in the one and "
                    f"{other} in the other; "
                    "encode both with the same model and cap"
                )

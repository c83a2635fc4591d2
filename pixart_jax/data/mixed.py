"""Several sets of training samples as one, each drawn with its share.

An epoch is as long as all sets together, N samples. A set of n samples and share w gets w·N places
of it, so each of its samples is shown r = w·N / n times in the mean. In each bucket the places cut
the line of the set's samples into equal stretches; a place shows the sample that its row's draw
meets in its stretch. So samples have equal chances in every epoch, are shown at least ⌈r⌉ − 1 times
where r > 1, and what a step shows is a function of seed and step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pixart_jax.data.samples import Samples, second_draw
from pixart_jax.errors import UserError

# Entries of an identity that may differ between sets that are trained on together.
_OF_THE_SET = ("source", "samples", "shard_size", "captions", "buckets", "flip")


class MixedSamples(Samples):
    """Samples of several ``parts`` with their ``shares``, which add up to 1; texts are padded to
    one length. Raises UserError for a part without samples or records of different encoders."""

    def __init__(self, parts: Sequence[Samples], shares: Sequence[float], names: Sequence[str]):
        _check_identities(parts, names)
        self.parts = tuple(parts)
        self.fingerprint = " ".join(part.fingerprint for part in parts)
        self.length = max(part.length for part in parts)
        for part in parts:
            part.length = self.length
        self.buckets = tuple(dict.fromkeys(bucket for part in parts for bucket in part.buckets))
        counts = [int((part.bucket_of >= 0).sum()) for part in parts]
        for name, count in zip(names, counts, strict=True):
            if not count:
                raise UserError(f"{name}, a part of a mixture, has no sample to train on")
        # of each place: part, bucket, and number of the place among `places` for the `members`
        self._members: dict[tuple[int, int], np.ndarray] = {}
        columns: list[tuple[np.ndarray, ...]] = []
        for number, (part, share, count) in enumerate(zip(parts, shares, counts, strict=True)):
            for own, size in enumerate(part.buckets):
                members = np.flatnonzero(part.bucket_of == own)
                places = round(len(members) * share * sum(counts) / count)
                bucket = self.buckets.index(size)
                self._members[number, bucket] = members
                ones = np.ones(places, np.int64)
                columns.append((number * ones, bucket * ones, np.arange(places), places * ones))
        self._part, bucket_of, self._place, self._places = map(np.concatenate, zip(*columns))
        self.bucket_of = bucket_of.astype(np.int16)

    def chosen(self, index: int, draw: float) -> tuple[int, int]:
        """(part, number of the sample in it) that a place shows for a draw."""
        part = int(self._part[index])
        members = self._members[part, int(self.bucket_of[index])]
        share = (self._place[index] + draw) / self._places[index]
        return part, int(members[min(int(share * len(members)), len(members) - 1)])

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket."""
        parts, samples = np.array([self.chosen(*row) for row in zip(indices, draws)]).T
        rest = np.array([second_draw(draw) for draw in draws])
        rows = [np.flatnonzero(parts == number) for number in range(len(self.parts))]
        found = [
            part.read(samples[mine], part.buckets.index(self.buckets[bucket]), rest[mine])
            for part, mine in zip(self.parts, rows, strict=True)
            if len(mine)
        ]
        back = np.argsort(np.concatenate(rows), kind="stable")
        return {name: np.concatenate([batch[name] for batch in found])[back] for name in found[0]}


def _check_identities(parts: Sequence[Samples], names: Sequence[str]) -> None:
    first = parts[0].identity or {}
    for part, name in zip(parts[1:], names[1:], strict=True):
        other = part.identity or {}
        if bool(first) != bool(other):
            raise UserError(
                f"{names[0]} and {name} cannot be mixed: only one says which encoders made it"
            )
        for field in sorted(first.keys() & other.keys() - set(_OF_THE_SET)):
            if first[field] != other[field]:
                raise UserError(
                    f"{names[0]} and {name} cannot be mixed: {field} is {first[field][:12]} in the "
                    f"one and {other[field][:12]} in the other; encode both with the same model "
                    "and cap"
                )

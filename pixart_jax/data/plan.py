"""Which samples make up the batch of step k: a function of the seed and k alone.

Each bucket is an endless stream: a permutation of its samples an epoch, one after the other.
Batches are cut from the stream without a gap, so no sample is ever dropped: after k steps two
samples of a bucket have been served equally often, or one of them once more. Epoch e holds, of
bucket i with nᵢ samples and batches of B,

    mᵢ(e) = ⌊(e+1)·nᵢ / B⌋ − ⌊e·nᵢ / B⌋        batches, Σᵢ mᵢ(e) steps,

in that epoch's random order; any step is found without its history.

A batch holds one bucket and is always full, so at an epoch's end (e+1)·nᵢ mod B samples of a bucket
come first of all in the next: late, never lost. A bucket with fewer than B samples gives a batch
every B / nᵢ epochs, which then holds each of them several times: as often as all others.

With a ``window``, a permutation takes a bucket's shards in random order, so many at a time, and
shuffles the samples of those among themselves: a reader needs no more shards at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from pixart_jax.errors import UserError

_ORDER, _SAMPLES, _DRAWS = range(3)  # what a random stream is for


@dataclasses.dataclass(frozen=True)
class Batch:
    """One global batch. bucket: its number. indices: int64 [b] samples. epochs: int64 [b], the pass
    of each sample. draws: float64 [b] in [0, 1), for random choices when a row is read."""

    step: int
    bucket: int
    indices: np.ndarray
    epochs: np.ndarray
    draws: np.ndarray


class BatchSchedule:
    """bucket_of: int [n], the bucket of each sample, −1 to leave it out. batch_size: global.
    window: shards that are shuffled together, 0 for all samples. shard_starts: the first sample of
    each shard."""

    def __init__(
        self,
        bucket_of: np.ndarray,
        batch_size: int,
        seed: int,
        window: int = 0,
        shard_starts: Sequence[int] | np.ndarray = (),
    ):
        bucket_of = np.asarray(bucket_of)
        if not (bucket_of >= 0).any():
            raise UserError("no sample to train on")
        self.batch_size, self.seed = batch_size, seed
        self._members = _members(bucket_of)
        # Python integers: no overflow in e·n
        self._counts = np.array([len(m) for m in self._members], object)
        # positions in a bucket where a shard ends
        ends = [
            np.unique(np.searchsorted(m, [*shard_starts[1:], len(bucket_of)]))
            for m in self._members
        ]
        self._shards = [some[some > 0] for some in ends]
        self._window = window
        self._passes = functools.lru_cache(maxsize=2 * len(self._members) + 2)(self._pass)
        self._orders = functools.lru_cache(maxsize=4)(self._order)

    @property
    def samples(self) -> int:
        """How many samples an epoch holds."""
        return int(sum(self._counts))

    @property
    def steps_ahead(self) -> int:
        """Steps in which a window of shards, of the bucket with most of them, is used up."""
        if not self._window:
            return 16
        most = max(map(len, self._shards))
        return max(1, self._window * self.samples // (self.batch_size * most))

    def first_step(self, epoch: int) -> int:
        """The step with which an epoch begins."""
        return int(sum(epoch * n // self.batch_size for n in self._counts))

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to."""
        epoch = step * self.batch_size // self.samples
        while self.first_step(epoch) > step:
            epoch -= 1
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def batch(self, step: int) -> Batch:
        """The global batch of a step; threads may ask for any steps in any order."""
        epoch = self.epoch_of(step)
        bucket, ordinal = self._orders(epoch)[step - self.first_step(epoch)]
        count, members = self._counts[bucket], self._members[bucket]
        indices: list[np.ndarray] = []
        epochs: list[np.ndarray] = []
        missing = self.batch_size
        while missing:
            at = (int(ordinal) + 1) * self.batch_size - missing
            number, offset = at // count, at % count
            taken = self._passes(bucket, number)[offset : offset + missing]
            indices.append(members[taken].astype(np.int64))
            epochs.append(np.full(len(taken), number))
            missing -= len(taken)
        draws = self._random(_DRAWS, step).random(self.batch_size)
        return Batch(step, int(bucket), np.concatenate(indices), np.concatenate(epochs), draws)

    def _random(self, purpose: int, *place: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, *place])

    def _order(self, epoch: int) -> np.ndarray:
        """int64 [steps, 2]: (bucket, number in the bucket's stream) of the epoch's steps."""
        batches = []
        for bucket, count in enumerate(self._counts):
            ordinals = np.arange(
                epoch * count // self.batch_size, (epoch + 1) * count // self.batch_size
            )
            batches.append(np.stack([np.full_like(ordinals, bucket), ordinals], -1))
        # A batch stays behind the ones before it in its bucket's stream: an epoch's own samples
        # come after its inheritance.
        order = np.concatenate(batches)
        slots = self._random(_ORDER, epoch).permutation(len(order))
        buckets = order[slots, 0]
        out = np.empty_like(order)
        for bucket, mine in enumerate(batches):
            out[buckets == bucket] = mine
        return out

    def _pass(self, bucket: int, number: int) -> np.ndarray:
        """A permutation of the bucket's samples for one pass.

        A batch may span the end of one pass and the start of the next. Samples that it already
        holds are moved back in the next pass, so that none occurs twice, if the bucket is large
        enough.
        """
        count = int(self._counts[bucket])
        order = self._permutation(bucket, number)
        # samples of the pass before in the straddling batch
        tail = number * count % self.batch_size
        if number == 0 or tail == 0 or count < 2 * self.batch_size:
            return order
        head = self.batch_size - tail
        # the far end is never moved
        before = self._permutation(bucket, number - 1)[count - tail :]
        repeated = np.flatnonzero(np.isin(order[:head], before))
        end = count - (number + 1) * count % self.batch_size
        # holds more free places than a batch can need
        near = order[head : min(end, head + 3 * self.batch_size)]
        free = head + np.flatnonzero(~np.isin(near, before))[: len(repeated)]
        order[repeated], order[free] = order[free], order[repeated]
        return order

    def _permutation(self, bucket: int, number: int) -> np.ndarray:
        random = self._random(_SAMPLES, bucket, number)
        if not self._window:
            return random.permutation(int(self._counts[bucket]))
        ends = self._shards[bucket]
        shards = np.split(np.arange(ends[-1]), ends[:-1])
        windows = np.array_split(random.permutation(len(shards)), -(-len(shards) // self._window))
        return np.concatenate(
            [random.permutation(np.concatenate([shards[n] for n in some])) for some in windows]
        )


def _members(bucket_of: np.ndarray) -> list[np.ndarray]:
    """The samples of each bucket, ascending; int32 where possible: ten million take 40 MB."""
    small = len(bucket_of) < 2**31
    order = np.argsort(bucket_of, kind="stable")  # of small integers: one pass, not a pass a bucket
    order = order.astype(np.int32) if small else order
    ends = np.cumsum(np.bincount(bucket_of[bucket_of >= 0].astype(np.int64, copy=False)))
    left_out = int((bucket_of < 0).sum())
    return np.split(order[left_out:], ends[:-1])

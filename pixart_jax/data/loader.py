"""Batches in the order of the plan, read ahead by grain's threads.

  batches = Loader(samples, batch_size=32, seed=0).iterator(start=step)
  batch = next(batches)           # {name: numpy array [rows of this process, …]}
  state = batches.get_state()     # for the checkpoint; set_state(state) resumes

A batch depends on (seed, step) alone, not on processes, threads, prefetching or the start.
"""

from __future__ import annotations

from collections.abc import Sequence

import grain
import numpy as np

from pixart_jax.data.plan import BatchSchedule
from pixart_jax.data.samples import Samples
from pixart_jax.errors import UserError

_STEPS = 2**31 - 1  # more than any run takes


class Loader:
    """Read ``samples`` in global batches of ``batch_size``. rows: of the global batch that this
    process reads, in order; None: all. workers: threads that read ahead. window: shards that are
    shuffled together (data.plan), 0 for all samples."""

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        seed: int,
        rows: Sequence[int] | np.ndarray | None = None,
        workers: int = 2,
        window: int = 0,
    ):
        self.samples = samples
        starts = samples.shard_starts
        if window and not len(starts):
            raise UserError("data.shuffle_shards is for one folder of encoded shards, no mixture")
        self.plan = BatchSchedule(samples.bucket_of, batch_size, seed, window, starts)
        self._rows = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
        self._workers = max(workers, 0)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Read this process's rows of the batch of a step."""
        if (fetch := self.samples.fetch) is not None:
            for near in (step, step + self.plan.steps_ahead):
                fetch(self.plan.batch(near).indices)
        return self._read(step, self._rows)

    def global_batch(self, step: int, rows: int | None = None) -> dict[str, np.ndarray]:
        """Read the global batch of a step, or its first ``rows``, the same on every process."""
        return self._read(step, np.arange(self.plan.batch_size)[:rows])

    def _read(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        batch = self.plan.batch(step)
        return self.samples.read(batch.indices[rows], batch.bucket, batch.draws[rows])

    def iterator(self, start: int = 0) -> grain.DatasetIterator:
        """Batches from step ``start`` on, without end. close() ends the threads."""
        ahead = 2 * self._workers + 2 if self._workers else 0
        options = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=ahead)
        batches = iter(grain.MapDataset.range(_STEPS).map(self.batch).to_iter_dataset(options))
        batches.set_state(self.state_at(start))
        return batches

    @staticmethod
    def state_at(step: int) -> dict[str, int]:
        """The iterator state whose next batch is that of ``step``."""
        return {"next_index": step}

"""Batches in the order of the plan, read ahead by grain's threads.

    loader = Loader(samples, batch_size=32, seed=0)
    batches = loader.iterator(start=step)
    batch = next(batches)            # {name: numpy array [rows of this process, …]}
    state = batches.get_state()      # goes into the checkpoint; set_state(state) goes on with the very next batch

What a batch holds depends on (seed, step) alone: not on processes, threads, prefetching or where the iterator started.
"""

from __future__ import annotations

import grain
import numpy as np

from pixart_jax.data.plan import Plan
from pixart_jax.data.samples import Samples
from pixart_jax.errors import UserError

_STEPS = 2**31 - 1  # more than any run takes


class Loader:
    """samples: what to read (data/samples.py, data/encoded.py). batch_size: of the global batch, of which each of
    process_count processes reads its own contiguous rows. workers: threads that read ahead, each a batch at a time."""

    def __init__(
        self,
        samples: Samples,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 2,
        prefetch: int | None = None,
    ):
        if batch_size % process_count:
            raise UserError(f"batch size {batch_size} cannot be shared by {process_count} processes: it must be a multiple")
        if not 0 <= process_index < process_count:
            raise UserError(f"process {process_index} of {process_count}: no such process")
        self.samples = samples
        self.plan = Plan(samples.bucket_of, batch_size, seed)
        rows = batch_size // process_count
        self._rows = slice(process_index * rows, (process_index + 1) * rows)
        self._workers = max(workers, 0)
        self._prefetch = prefetch if prefetch is not None else 2 * self._workers + 2

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the batch of a step, read now."""
        batch = self.plan.batch(step)
        return self.samples.read(batch.indices[self._rows], batch.bucket, batch.draws[self._rows])

    def bucket(self, step: int) -> tuple[int, int]:
        """(height, width) in px of a step's batch, the same on every process."""
        return self.samples.buckets[self.plan.batch(step).bucket]

    def iterator(self, start: int = 0) -> grain.DatasetIterator:
        """Batches from step ``start`` on, without end. get_state() and set_state() carry the place; close() ends the threads."""
        options = grain.ReadOptions(num_threads=self._workers, prefetch_buffer_size=self._prefetch if self._workers else 0)
        batches = iter(grain.MapDataset.range(_STEPS).map(self.batch).to_iter_dataset(options))
        batches.set_state(self.state_at(start))
        return batches

    @staticmethod
    def state_at(step: int) -> dict:
        """The iterator state whose next batch is that of ``step``."""
        return {"next_index": step}

    def __iter__(self):
        return self.iterator()

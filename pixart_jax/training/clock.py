"""Where the time of a stage goes: stepping, waiting for data, compiling, or neither."""

from __future__ import annotations

import contextlib
import time


class StepTimer:
    """Counts from step to step; what is not stepping (saves, previews, compiling) is taken out.

    productive: seconds of stepping since the run's first step, those of an earlier process that its
    save holds included. peak: FLOP/s of all devices together, or None where it is not known.
    """

    def __init__(self, batch_size: int, productive: float = 0.0, peak: float | None = None):
        self.productive = productive
        self.compiling = 0.0  # seconds, all of this stage in this process
        self._batch, self._peak = batch_size, peak
        self._last, self._out = time.perf_counter(), 0.0
        self._first = True
        self._begin()

    def _begin(self) -> None:
        self._steps, self._seconds, self._waited, self._flops = 0, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self):
        """The host fetches a batch and hands it to the devices."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def paused(self):
        """Something that is no step: a save, a preview."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._out += time.perf_counter() - begun

    def compiled(self, seconds: float) -> None:
        """A step's call took this long because its program was compiled first."""
        self.compiling += seconds
        self._out += seconds

    def done(self, flops: float) -> None:
        """Another step's result is here. flops: of its images together, 0 where not known.

        The first one of a process is productive, but no rate is made of it: caches are cold.
        """
        now = time.perf_counter()
        seconds = max(now - self._last - self._out, 0.0)
        self._last, self._out = now, 0.0
        self.productive += seconds
        if self._first:
            self._first = False
            self._begin()
        else:
            self._steps += 1
            self._seconds += seconds
            self._flops += flops

    def rates(self) -> dict[str, float]:
        """Since the last call: steps and images a second, the share of time spent waiting for data,
        and MFU where both its sides are known; {} where no step was timed."""
        steps, seconds, waited, flops = self._steps, self._seconds, self._waited, self._flops
        self._begin()
        if not steps or seconds <= 0:
            return {}
        found = {
            "steps_per_second": steps / seconds,
            "images_per_second": steps * self._batch / seconds,
        }
        found["data_wait"] = min(waited / seconds, 1.0)
        if self._peak and flops:
            found["mfu"] = flops / seconds / self._peak
        return found

"""A profiler trace of asked steps, for TensorBoard, Perfetto or XProf."""

from __future__ import annotations

from pathlib import Path

import jax


class StepProfiler:
    """steps: (first, last) by the run's count, both traced whole; None: nothing. Use as a context:
    leaving it ends a trace."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._open = Path(folder), steps, False

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_):
        self._close()

    def opens(self, total: int) -> bool:
        """Whether the trace begins with this step; the steps before it must be done then."""
        return (
            self._steps is not None and not self._open and self._steps[0] <= total <= self._steps[1]
        )

    def closes(self, total: int) -> bool:
        """Whether this step is the trace's last; it must be done before ``stop``."""
        return self._open and total >= self._steps[1]

    def start(self) -> None:
        jax.profiler.start_trace(str(self._folder))
        self._open = True

    def stop(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            if jax.process_index() == 0:
                print(
                    f"profile of steps {self._steps[0]} to {self._steps[1]}: {self._folder} "
                    "(tensorboard --logdir, or ui.perfetto.dev)"
                )

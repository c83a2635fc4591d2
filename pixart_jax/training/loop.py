"""The loop of one stage: batches, steps, and at intervals a log line, a checkpoint and a
preview."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from pixart_jax.config import Config
from pixart_jax.errors import Interrupted
from pixart_jax.parallel import liveness
from pixart_jax.parallel.rules import batch_sharding
from pixart_jax.training.bad_steps import describe
from pixart_jax.training.batches import put
from pixart_jax.training.interruption import PreemptionHandler
from pixart_jax.training.metrics import StepTimer
from pixart_jax.training.state import TrainState


class TrainingDiverged(Exception):
    """Too many steps in a row were skipped. The message names the stage, the step, the cause and
    the batch's records."""


@dataclasses.dataclass
class MetricWindow:
    """Sums of the metrics since the last logged line; part of a checkpoint, so that a resumed run
    logs the same lines. Of a skipped step only the count enters: its loss may not be finite.
    """

    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    count: int = 0
    skipped: int = 0

    def add(self, values: dict[str, float]) -> None:
        if values["skipped"]:
            self.skipped += 1
            return
        self.count += 1
        for name, value in values.items():
            if not name.startswith("skipped"):
                self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, float]:
        """Over the good steps; without a loss where there was none."""
        means = {name: value / self.count for name, value in self.sums.items()}
        return means | {"skipped": self.skipped}


class LoopHooks:
    """Callbacks of the loop; those of this class do nothing. Steps are those of the stage, counted
    from 1."""

    def should_save(self, step: int) -> bool:
        """Whether a checkpoint is due."""
        return False

    def save(self, step: int, state: TrainState, window: MetricWindow) -> None:
        """Write a checkpoint."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a line of metrics."""

    def preview(self, step: int, state: TrainState) -> None:
        """Draw samples."""

    def on_bad_step(self, step: int, values: dict[str, float]) -> list[str]:
        """Record a skipped step; returns the record keys of its batch."""
        return []

    def flops(self, batch: dict) -> float:
        """FLOPs of a step on this batch (its rows in this process); 0 where unknown."""
        return 0.0


def train(
    state: TrainState,
    step_function,
    loader,
    hooks: LoopHooks,
    *,
    config: Config,
    index: int,
    mesh: Mesh,
    start: int,
    window: MetricWindow,
    timer: StepTimer,
    interruption: PreemptionHandler,
    profile: Path,
) -> TrainState:
    """Run steps start + 1 … of stage ``index`` to its end; step k's random key is the stage's with
    k − 1 folded in.

    A step's metrics are read while the next one runs, so the device never waits for the host. A
    checkpoint that falls due within a row of bad steps waits for the next good one. Raises
    TrainingDiverged after too many bad steps in a row, before anything more is saved, and
    Interrupted after a signal, the state saved. profile: the folder of a trace (config.profile).
    """
    stage, preview_every = config.stages[index], config.preview.every
    if start >= stage.steps:
        return state
    done = sum(before.steps for before in config.stages[:index])  # steps of the run
    key = jax.random.fold_in(jax.random.key(config.seed), 1_000 + index)
    sharding, batches = batch_sharding(mesh), loader.iterator(start=start)
    bar = _progress_bar(stage.name, start, stage.steps)
    pending: tuple[int, dict, float] | None = None
    in_row, due = 0, False
    shapes: set[tuple] = set()  # of the batches so far

    def read_pending() -> None:
        """Read the metrics of the step that was dispatched last."""
        nonlocal pending, window, in_row
        if pending is None:
            return
        (number, metrics, flops), pending = pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        timer.done(flops)
        bar.update()
        liveness.report_step(number)
        in_row = int(values["skipped_in_row"])
        if values["skipped"]:
            keys = hooks.on_bad_step(number, values)
            if in_row >= config.guard.bad_steps_in_row:
                raise TrainingDiverged(
                    f"stage {stage.name}, step {number}, the last of {in_row} bad steps in a row: "
                    f"{describe(values, keys)}"
                )
        window.add(values)
        if number % config.log_every == 0 or number == stage.steps:
            recompilations = step_function.executables - len(shapes)
            line = {**window.means(), "lr": values["lr"], **timer.rates()}
            line["recompilations"] = recompilations
            shown = {"loss": "loss", "images_s": "images_per_second", "mfu": "mfu"}
            text = {short: f"{line[name]:.4g}" for short, name in shown.items() if name in line}
            bar.set_postfix(text, refresh=False)
            hooks.log(number, line)
            window = MetricWindow()

    def dispatch(state, batch, number):
        """Begin a step. Compiling is not part of a step's time."""
        before, begun = step_function.executables, time.perf_counter()
        state, metrics = step_function(state, batch, jax.random.fold_in(key, number - 1))
        if step_function.executables > before:
            timer.exclude(time.perf_counter() - begun)
        return state, metrics

    trace = StepProfiler(profile, config.profile.steps)
    try:
        with interruption.deferred(), trace:
            for number in range(start + 1, stage.steps + 1):
                if trace.opens(done + number):
                    read_pending()
                    trace.start()
                with timer.waiting():
                    rows = next(batches)
                    batch = put(rows, sharding)
                shapes.add(tuple(sorted((name, array.shape) for name, array in batch.items())))
                state, metrics = dispatch(state, batch, number)
                read_pending()
                pending = (number, metrics, hooks.flops(rows))
                last, stop = number == stage.steps, interruption.should_stop(done + number)
                look = last or (preview_every and number % preview_every == 0)
                due = due or hooks.should_save(number)
                if trace.closes(done + number):
                    read_pending()
                    trace.stop()
                if last or stop or look or due:
                    read_pending()
                    with timer.paused():
                        if last or stop or (due and not in_row):
                            hooks.save(number, state, window)
                            due = False
                        if look and not stop:
                            hooks.preview(number, state)
                if stop:
                    raise Interrupted(stop)
    finally:
        liveness.report_step(None)
        bar.close()
        if close := getattr(batches, "close", None):
            close()
    return state


def _progress_bar(name: str, start: int, steps: int) -> tqdm:
    return tqdm(
        total=steps,
        initial=start,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,  # seconds; few lines in a log file
        disable=jax.process_index() > 0,
    )


class StepProfiler:
    """A profiler trace of some steps, for TensorBoard, Perfetto or XProf; leaving the context ends
    it.

    steps: (first, last) by the run's count, both traced entirely; None: no trace.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._open = Path(folder), steps, False

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def opens(self, total: int) -> bool:
        """Whether the trace begins with this step; the steps before it must be done then."""
        if self._steps is None or self._open:
            return False
        return self._steps[0] <= total <= self._steps[1]

    def closes(self, total: int) -> bool:
        """Whether this step is the trace's last; it must be done before ``stop``."""
        return self._open and self._steps is not None and total >= self._steps[1]

    def start(self) -> None:
        jax.profiler.start_trace(str(self._folder))
        self._open = True

    def stop(self) -> None:
        """End the trace, if one is open, and print where it is."""
        if not self._open or self._steps is None:
            return
        self._open = False
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            print(
                f"profile of steps {self._steps[0]} to {self._steps[1]}: {self._folder} "
                "(tensorboard --logdir, or ui.perfetto.dev)"
            )

"""The loop of one stage: batches in, steps, and from time to time a line, a save and a look at what
it draws."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable

import jax
from tqdm import tqdm

from pixart_jax.errors import Interrupted
from pixart_jax.parallel import liveness
from pixart_jax.training.bad_steps import describe
from pixart_jax.training.batches import put
from pixart_jax.training.clock import StepTimer
from pixart_jax.training.interruption import PreemptionHandler
from pixart_jax.training.state import TrainState
from pixart_jax.training.trace import StepProfiler


class TrainingDiverged(Exception):
    """Too many steps in a row could not be taken. The message names the stage, the step, what was
    wrong and the batch's records."""


@dataclasses.dataclass
class MetricWindow:
    """Sums of the metrics since the last logged line; saved with a checkpoint, so that a resumed
    run logs the same lines.

    A skipped step counts as skipped, and nowhere else: its loss may be no number.
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
        """Of the good steps; no loss where there was none."""
        return {name: value / self.count for name, value in self.sums.items()} | {
            "skipped": self.skipped
        }


@dataclasses.dataclass(frozen=True)
class LoopHooks:
    """What the loop does besides stepping. Steps are those of the stage, counted from 1.

    log_every, preview_every: steps (preview 0: at the end alone). saves(step): whether one is due.
    patience: so many bad steps in a row end the run. done: steps of the run before this stage.
    log(step, values); save(step, state, window); preview(step, state); bad(step, values) → the
    record keys of the step's batch; flops(batch) of its forward and backward pass.
    """

    log_every: int
    preview_every: int
    max_bad_steps: int
    done: int
    should_save: Callable[[int], bool]
    log: Callable[[int, dict[str, float]], None]
    save: Callable[[int, TrainState, MetricWindow], None]
    preview: Callable[[int, TrainState], None]
    on_bad_step: Callable[[int, dict[str, float]], list[str]]
    flops: Callable[[dict], float]
    clock: StepTimer
    interruption: PreemptionHandler
    trace: StepProfiler


def train(
    state: TrainState,
    step_function,
    loader,
    *,
    name: str,
    start: int,
    steps: int,
    key: jax.Array,
    sharding,
    watch: LoopHooks,
    window: MetricWindow,
) -> TrainState:
    """Run steps start … steps − 1 of a stage; step k's key is ``key`` with k folded in.

    Each step's metrics are read while the next one runs, so the device never waits for the host. A
    save that falls due within a row of bad steps waits for the first good one. Raises Diverged
    after ``watch.max_bad_steps`` bad steps in a row, before anything more is saved, and
    Interrupted, the state saved, when a signal asked for it.
    """
    if start >= steps:
        return state
    batches = loader.iterator(start=start)
    often = 0.5 if sys.stderr.isatty() else 15.0  # seconds; a log file wants few lines
    bar = tqdm(
        total=steps,
        initial=start,
        desc=name,
        unit="step",
        dynamic_ncols=True,
        mininterval=often,
        disable=jax.process_index() > 0,
    )
    pending: tuple[int, dict, float] | None = None
    in_row, due = 0, False
    shapes, clock = set(), watch.clock

    def settle() -> None:
        """Read what the step that was begun last has given."""
        nonlocal pending, window, in_row
        if pending is None:
            return
        (number, metrics, flops), pending = pending, None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        clock.done(flops)
        bar.update()
        liveness.report_step(number)
        in_row = int(values["skipped_in_row"])
        if values["skipped"]:
            keys = watch.on_bad_step(number, values)
            if in_row >= watch.max_bad_steps:
                raise TrainingDiverged(
                    f"stage {name}, step {number}, the last of {in_row} bad steps in a row: "
                    f"{describe(values, keys)}"
                )
        window.add(values)
        if number % watch.log_every == 0 or number == steps:
            line = {
                **window.means(),
                "lr": values["lr"],
                **clock.rates(),
                "recompilations": step_function.executables - len(shapes),
            }
            shown = {"loss": "loss", "images_s": "images_per_second", "mfu": "mfu"}
            bar.set_postfix(
                {short: f"{line[long]:.4g}" for short, long in shown.items() if long in line},
                refresh=False,
            )
            watch.log(number, line)
            window = MetricWindow()

    def dispatch(state, batch, number):
        """Begin a step. A call that had to compile is no step's time."""
        before, begun = step_function.executables, time.perf_counter()
        state, metrics = step_function(state, batch, jax.random.fold_in(key, number - 1))
        if step_function.executables > before:
            clock.compiled(time.perf_counter() - begun)
        return state, metrics

    try:
        with watch.interruption.deferred(), watch.trace:
            for number in range(start + 1, steps + 1):
                if watch.trace.opens(watch.done + number):
                    settle()
                    watch.trace.start()
                with clock.waiting():
                    rows = next(batches)
                    batch = put(rows, sharding)
                shapes.add(tuple(sorted((name, array.shape) for name, array in batch.items())))
                state, metrics = dispatch(state, batch, number)
                settle()
                pending = (number, metrics, watch.flops(rows))
                last, stop = number == steps, watch.interruption.should_stop(watch.done + number)
                look = last or (watch.preview_every and number % watch.preview_every == 0)
                due = due or watch.should_save(number)
                if watch.trace.closes(watch.done + number):
                    settle()
                    watch.trace.stop()
                if last or stop or look or due:
                    settle()
                    with clock.paused():
                        if last or stop or (due and not in_row):
                            watch.save(number, state, window)
                            due = False
                        if look and not stop:
                            watch.preview(number, state)
                if stop:
                    raise Interrupted(stop)
    finally:
        liveness.report_step(None)
        bar.close()
        close = getattr(batches, "close", None)
        if close:
            close()
    return state

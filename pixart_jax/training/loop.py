"""The loop of one stage: batches, steps, and at intervals a log line, an evaluation, a checkpoint
and a preview."""

from __future__ import annotations

import contextlib
import sys
import time

import jax
from tqdm import tqdm

from pixart_jax.data.loader import Loader
from pixart_jax.errors import Interrupted
from pixart_jax.parallel import liveness
from pixart_jax.parallel.rules import batch_sharding
from pixart_jax.training.bad_steps import describe
from pixart_jax.training.batches import put
from pixart_jax.training.metrics import MetricWindow
from pixart_jax.training.run import Run, StageHooks
from pixart_jax.training.state import TrainState
from pixart_jax.training.step import CompiledStep


class TrainingDiverged(Exception):
    """Too many steps in a row were skipped. The message names the stage, the step, the cause and
    the batch's records."""


def train(
    run: Run,
    index: int,
    state: TrainState,
    step: CompiledStep,
    loader: Loader,
    hooks: StageHooks,
    start: int,
    window: MetricWindow,
) -> TrainState:
    """Run steps start + 1 … of stage ``index`` to its end; step k's random key is the stage's with
    k − 1 folded in.

    A step's metrics are read while the next one runs, so the device never waits for the host. A
    checkpoint that falls due within a row of bad steps waits for the next good one. Raises
    TrainingDiverged after too many bad steps in a row, before anything more is saved, and
    Interrupted after a signal, the state saved.
    """
    config, timer, stage = run.config, hooks.timer, run.config.stages[index]
    if start >= stage.steps:
        return state
    done = sum(before.steps for before in config.stages[:index])  # steps of the run
    key = jax.random.fold_in(jax.random.key(config.seed), 1_000 + index)
    sharding, batches = batch_sharding(run.mesh), loader.iterator(start=start)
    bar = _progress_bar(stage.name, start, stage.steps)
    pending: tuple[int, dict, float] | None = None
    in_row, save_due = 0, False
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
            line = {**window.means(), "lr": values["lr"], **timer.rates()}
            line["recompilations"] = step.executables - len(shapes)
            shown = {"loss": "loss", "images_s": "images_per_second", "mfu": "mfu"}
            text = {short: f"{line[name]:.4g}" for short, name in shown.items() if name in line}
            bar.set_postfix(text, refresh=False)
            hooks.log(number, line)
            window = MetricWindow()

    profile, trace = config.profile.steps or (0, -1), contextlib.ExitStack()
    try:
        with run.interruption.deferred(), trace:
            for number in range(start + 1, stage.steps + 1):
                total = done + number
                traced = profile[0] <= total <= profile[1]
                if traced and (total == profile[0] or number == start + 1):
                    read_pending()
                    _start_trace(trace, run, profile)
                with timer.waiting():
                    rows = next(batches)
                    batch = put(rows, sharding)
                shapes.add(tuple(sorted((name, array.shape) for name, array in batch.items())))
                executables, begun = step.executables, time.perf_counter()
                state, metrics = step(state, batch, jax.random.fold_in(key, number - 1))
                if step.executables > executables:  # compiling is not part of a step's time
                    timer.exclude(time.perf_counter() - begun)
                read_pending()
                pending = (number, metrics, hooks.flops(rows))
                last, stop = number == stage.steps, run.interruption.should_stop(total)
                every = config.preview.every
                preview = last or (every and number % every == 0)
                save_due = save_due or hooks.should_save(number)
                evaluate = hooks.should_evaluate(number)
                if traced and total == profile[1]:
                    read_pending()
                    trace.close()
                if last or stop or preview or save_due or evaluate:
                    read_pending()
                    with timer.paused():
                        # before the checkpoint, whose log then holds it
                        ended = evaluate and hooks.evaluate(number, state)
                        if last or ended or stop or (save_due and not in_row):
                            hooks.save(number, state, window, ended)
                            save_due = False
                        if (preview or ended) and not stop:
                            hooks.preview(number, state)
                    if ended:
                        break
                if stop:
                    raise Interrupted(stop)
    finally:
        liveness.report_step(None)
        bar.close()
        batches.close()
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


def _start_trace(trace: contextlib.ExitStack, run: Run, steps: tuple[int, int]) -> None:
    """Trace for TensorBoard, Perfetto or XProf until ``trace`` closes; then print where it is."""
    folder = run.folder.profile
    if jax.process_index() == 0:
        where = f"{folder} (tensorboard --logdir, or ui.perfetto.dev)"
        trace.callback(print, f"profile of steps {steps[0]} to {steps[1]}: {where}")
    trace.enter_context(jax.profiler.trace(str(folder)))

"""Metrics of a run: metrics.jsonl, bad_steps.jsonl, attempts.jsonl, TensorBoard events, Weights &
Biases, the loss curve, and the time and memory figures among them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tensorboardX.summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from pixart_jax import plots
from pixart_jax.errors import UserError, one_line
from pixart_jax.files import write_text

# Metrics that depend on the machine and its clock. All others are equal to the bit in a run that
# was interrupted and in one that was not.
TIMING = (
    *("steps_per_second", "images_per_second", "data_wait", "mfu", "goodput", "restarts"),
    *("recompilations", "device_memory_gib", "device_memory_peak_gib"),
)


class Metrics:
    """Writes metrics under ``folder``; a context. Of several processes the first one writes.

    start: total steps already done; lines beyond them, which a killed run logged and its last
    checkpoint does not hold, are removed: they will be logged again. TensorBoard drops such events
    of earlier files by itself. project: the Weights & Biases project that gets the same values
    (extra ``wandb``); config: the hyperparameters it shows. Raises UserError without the extra.
    """

    def __init__(
        self, folder: Path, start: int, project: str | None = None, config: dict | None = None
    ):
        self.file, self.bad = Path(folder) / "metrics.jsonl", Path(folder) / "bad_steps.jsonl"
        self._is_writer = jax.process_index() == 0
        if not self._is_writer:
            return
        self._wandb = _open_wandb(Path(folder), project, config) if project else None
        for file in (self.file, self.bad):
            lines = [line for line in read(file) if line["total_step"] <= start]
            if file.exists():
                write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
        self._lines = open(self.file, "a")
        # not SummaryWriter, whose thread writes: a full disk must be an error of this thread
        self._events = EventsWriter(str(Path(folder) / "events"), f".{os.getpid()}")
        if start:
            self._event(start + 1, session_log=SessionLog(status=SessionLog.START))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind, *_) -> None:
        for file in (self._lines, self._events) if self._is_writer else ():
            try:
                file.close()
            except OSError:
                # an error that already ends the run is the one to report
                if kind is None:
                    raise
        if self._is_writer and self._wandb:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, stage: str, step: int, total: int, values: dict[str, float]) -> None:
        """One line, and one event a value. step: within the stage; total: of the whole run."""
        if not self._is_writer:
            return
        line = {"stage": stage, "step": step, "total_step": total, **values}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._event(total, summary=tensorboardX.summary.scalar(f"{stage}/{name}", value))
        self._events.flush()
        if self._wandb:
            named = {f"{stage}/{name}": value for name, value in values.items()}
            self._wandb.log({"total_step": total, **named})

    def bad_step(
        self, stage: str, step: int, total: int, values: dict[str, float], keys: list[str]
    ) -> None:
        """One line for a skipped step. keys: the records of its batch."""
        if self._is_writer:
            line: dict = {"stage": stage, "step": step, "total_step": total}
            line |= {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            with open(self.bad, "a") as file:
                file.write(json.dumps({**line, "keys": keys}) + "\n")

    def image(self, name: str, image: np.ndarray, total: int) -> None:
        """image: uint8 [h, w, 3]."""
        if self._is_writer:
            self._event(total, summary=tensorboardX.summary.image(name, image, dataformats="HWC"))
            self._events.flush()
            if self._wandb:
                import wandb

                self._wandb.log({"total_step": total, name: wandb.Image(image)})

    def _event(self, step: int, **fields) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **fields))


def _open_wandb(folder: Path, project: str, config: dict | None):
    """The run of this folder: the same one at each start. Values lie over total_step, not over
    W&B's own step, which never goes back: a resumed run logs some steps again."""
    try:
        import wandb
    except ImportError:
        raise UserError('wandb needs an extra: pip install "pixart-jax[wandb]"') from None
    id_file = folder / "wandb_id"
    if not id_file.exists():
        write_text(id_file, uuid.uuid4().hex[:12])
    try:
        run = wandb.init(
            project=project,
            name=folder.name,
            id=id_file.read_text(),
            resume="allow",
            dir=folder,
            config=config,
        )
    except wandb.Error as error:  # no login, no network, no such entity
        advice = "`wandb login`, WANDB_MODE=offline, or --wandb None"
        raise UserError(f"Weights & Biases: {one_line(error)}; {advice}") from None
    run.define_metric("*", step_metric="total_step")
    return run


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


def read(file: Path) -> list[dict]:
    """The lines of a .jsonl file, without a last one that was cut short."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class RestartLog:
    """The starts of a run, one line each in attempts.jsonl; the goodput is measured from the first.

    total: the step of the run that this start resumes from.
    """

    def __init__(self, folder: Path, total: int, devices: int, kind: str):
        file, now = Path(folder) / "attempts.jsonl", time.time()
        line = {
            "time": now,
            "total_step": total,
            "processes": jax.process_count(),
            "devices": devices,
            "kind": kind,
            "jax": jax.__version__,
        }
        before = read(file)
        if jax.process_index() == 0:
            write_text(file, "".join(json.dumps(entry) + "\n" for entry in [*before, line]))
        self.first: float = before[0]["time"] if before else now
        self.restarts = len(before)

    def goodput(self, productive: float) -> float:
        """Share of the wall time since the first start spent in steps that count. productive:
        seconds."""
        wall = max(time.time() - self.first, productive)  # a clock may be set back
        return productive / max(wall, 1e-9)


class StepTimer:
    """Measures from step to step, without what is not stepping: checkpoints, previews, compiling.

    productive: seconds of stepping since the run's first step, those of earlier processes included.
    peak: FLOP/s of all devices together, or None where unknown.
    """

    def __init__(self, batch_size: int, productive: float = 0.0, peak: float | None = None):
        self.productive = productive
        self._batch, self._peak = batch_size, peak
        self._last, self._excluded = time.perf_counter(), 0.0
        self._steps, self._seconds, self._waited, self._flops = -1, 0.0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The host fetches a batch and hands it to the devices."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Something that is not a step: a checkpoint, a preview."""
        begun = time.perf_counter()
        yield
        self.exclude(time.perf_counter() - begun)

    def exclude(self, seconds: float) -> None:
        """Seconds that are not stepping: a program was compiled first."""
        self._excluded += seconds

    def done(self, flops: float) -> None:
        """A step's result has arrived. flops: of its whole batch, 0 where unknown.

        The first step of a process counts as productive but in no rate: caches are cold.
        """
        now = time.perf_counter()
        seconds = max(now - self._last - self._excluded, 0.0)
        self._last, self._excluded = now, 0.0
        self.productive += seconds
        self._steps += 1
        if self._steps:
            self._seconds += seconds
            self._flops += flops
        else:  # the first step
            self._waited = 0.0

    def rates(self) -> dict[str, float]:
        """Since the last call: steps and images a second, the share of time spent waiting for data,
        and MFU where FLOPs and peak are known; {} where no step was timed."""
        steps, seconds, waited, flops = self._steps, self._seconds, self._waited, self._flops
        if steps < 1 or seconds <= 0:
            return {}
        self._steps, self._seconds, self._waited, self._flops = 0, 0.0, 0.0, 0.0
        rates = {
            "steps_per_second": steps / seconds,
            "images_per_second": steps * self._batch / seconds,
            "data_wait": min(waited / seconds, 1.0),
        }
        return rates | ({"mfu": flops / seconds / self._peak} if self._peak and flops else {})


def device_memory(devices) -> dict[str, float]:
    """GiB in use, and the most in use, on the fullest of this process's devices; {} where the
    platform does not report it (a CPU)."""
    mine = [device for device in devices if device.process_index == jax.process_index()]
    stats = [found for device in mine if (found := device.memory_stats())]
    names = {"device_memory_gib": "bytes_in_use", "device_memory_peak_gib": "peak_bytes_in_use"}
    return {
        name: max(s[key] for s in stats) / 2**30
        for name, key in names.items()
        if stats and all(key in s for s in stats)
    }


def write_loss_curve(file: Path, lines: list[dict]) -> None:
    """Draw the loss (log scale) over total steps, one colour a stage, as a PNG."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for line in lines:
        if line.get("loss", 0) > 0:
            steps, losses = series.setdefault(line["stage"], ([], []))
            steps.append(line["total_step"])
            losses.append(line["loss"])
    plots.curves(file, series, title="loss", axis="step", log=True)


def summary(folder: Path) -> str:
    """A line on the whole run and one for each stage; images/s and MFU are medians over the logged
    lines."""
    lines, starts = read(folder / "metrics.jsonl"), read(folder / "attempts.jsonl")
    if not lines:
        return "nothing was logged"
    last = lines[-1]
    run = [f"{last['total_step']} steps"]
    if goodput := [line["goodput"] for line in lines if "goodput" in line]:
        run.append(
            f"goodput {goodput[-1]:.0%} of the time since the first start, "
            f"{max(len(starts) - 1, 0)} restarts"
        )
    if memory := max((line.get("device_memory_peak_gib", 0.0) for line in lines), default=0.0):
        run.append(f"device memory at most {memory:.1f} GiB")
    text = [", ".join(run)]
    for name in dict.fromkeys(line["stage"] for line in lines):
        text.append(f"  {name}: {_of_stage([line for line in lines if line['stage'] == name])}")
    return "\n".join(text)


def _of_stage(lines: list[dict]) -> str:
    losses = [line["loss"] for line in lines if "loss" in line]
    parts = [f"{lines[-1]['step']} steps"] + ([f"loss {losses[-1]:.4g}"] if losses else [])
    if held_out := [line["evaluate/loss"] for line in lines if "evaluate/loss" in line]:
        parts.append(f"held-out loss {held_out[-1]:.4g}")
    for name, form in (
        ("images_per_second", "{:.3g} images/s"),
        ("mfu", "MFU {:.1%}"),
        ("data_wait", "{:.1%} waiting for data"),
    ):
        if values := [line[name] for line in lines if name in line]:
            parts.append(form.format(statistics.median(values)))
    parts.append(f"{sum(line.get('skipped', 0) for line in lines)} steps skipped")
    parts.append(f"{max(line.get('recompilations', 0) for line in lines)} recompilations")
    return ", ".join(parts)

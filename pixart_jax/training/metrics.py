"""Metrics of a run: metrics.jsonl, bad_steps.jsonl, attempts.jsonl, TensorBoard events, the loss
curve, and the time and memory figures among them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from pixart_jax import plots
from pixart_jax.files import write_text

# Metrics that depend on the machine and its clock. All others are equal to the bit in a run that
# was interrupted and in one that was not.
TIMING = (
    "steps_per_second",
    "images_per_second",
    "data_wait",
    "mfu",
    "goodput",
    "restarts",
    "recompilations",
    "device_memory_gib",
    "device_memory_peak_gib",
)


class Metrics:
    """Writes metrics under ``folder``; a context. Of several processes the first one writes.

    start: total steps already done; lines beyond them, which a killed run logged and its last
    checkpoint does not hold, are removed: they will be logged again.
    """

    def __init__(self, folder: Path, start: int):
        self.file = Path(folder) / "metrics.jsonl"
        self.bad = Path(folder) / "bad_steps.jsonl"
        self._is_writer = jax.process_index() == 0
        if self._is_writer:
            for file in (self.file, self.bad):
                lines = [line for line in read(file) if line["total_step"] <= start]
                if file.exists():
                    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
            self._lines = open(self.file, "a")
            self._events = _Events(folder, purge_step=start + 1 if start else None)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind, *_) -> None:
        if self._is_writer:
            for file in (self._lines, self._events):
                try:
                    file.close()
                except OSError:
                    # an error that already ends the run is the one to report
                    if kind is None:
                        raise

    def write(self, *, stage: str, step: int, total: int, values: dict[str, float]) -> None:
        """One line, and one event a value. step: within the stage; total: of the whole run."""
        if not self._is_writer:
            return
        line = {"stage": stage, "step": step, "total_step": total, **values}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.scalar(f"{stage}/{name}", value, total)
        self._events.flush()

    def bad_step(
        self, *, stage: str, step: int, total: int, values: dict[str, float], keys: list[str]
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
            self._events.image(name, image, total)
            self._events.flush()


class _Events:
    """A TensorBoard event file, written by the caller's own thread.

    tensorboardX's SummaryWriter writes on a thread of its own, where a full disk ends in a
    traceback that nothing can catch. Here a failed write is the caller's OSError. purge_step:
    TensorBoard drops what earlier files of the folder hold from this step on.
    """

    def __init__(self, folder: Path, purge_step: int | None = None):
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        now = time.time()
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(str(Path(folder) / name))
        self._write(wall_time=now, file_version="brain.Event:2")
        if purge_step is not None:
            log = SessionLog(status=SessionLog.START)
            self._write(wall_time=now, step=purge_step, session_log=log)

    def scalar(self, name: str, value: float, step: int) -> None:
        from tensorboardX import summary

        self._write(wall_time=time.time(), step=step, summary=summary.scalar(name, value))

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        from tensorboardX import summary

        value = summary.image(name, image, dataformats="HWC")
        self._write(wall_time=time.time(), step=step, summary=value)

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        self._records._writer.flush()  # RecordWriter.flush would sync the disk, every time

    def close(self) -> None:
        self._records.close()

    def _write(self, **fields) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._records.write(Event(**fields).SerializeToString())


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
        return productive / max(time.time() - self.first, 1e-9)


class StepTimer:
    """Measures from step to step, without what is not stepping: checkpoints, previews, compiling.

    productive: seconds of stepping since the run's first step, those of earlier processes included.
    peak: FLOP/s of all devices together, or None where unknown.
    """

    def __init__(self, batch_size: int, productive: float = 0.0, peak: float | None = None):
        self.productive = productive
        self._batch, self._peak = batch_size, peak
        self._last, self._excluded = time.perf_counter(), 0.0
        self._first = True
        self._reset()

    def _reset(self) -> None:
        self._steps, self._seconds, self._waited, self._flops = 0, 0.0, 0.0, 0.0

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
        try:
            yield
        finally:
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
        if self._first:
            self._first = False
            self._reset()
        else:
            self._steps += 1
            self._seconds += seconds
            self._flops += flops

    def rates(self) -> dict[str, float]:
        """Since the last call: steps and images a second, the share of time spent waiting for data,
        and MFU where FLOPs and peak are known; {} where no step was timed."""
        steps, seconds, waited, flops = self._steps, self._seconds, self._waited, self._flops
        self._reset()
        if not steps or seconds <= 0:
            return {}
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
    if "goodput" in last:
        run.append(
            f"goodput {last['goodput']:.0%} of the time since the first start, "
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

"""A run's figures: metrics.jsonl, bad_steps.jsonl, TensorBoard events and, at the end, the loss
curve as a PNG."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax
import numpy as np

from pixart_jax.training.events import Events

# Figures that depend on the machine and its clock. All others are equal to the bit in a run that
# was never stopped and in one that was.
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
    """Writes under ``folder``; a context. start: total steps already done, anything logged beyond
    them is taken back."""

    def __init__(self, folder: Path, start: int):
        self.file = Path(folder) / "metrics.jsonl"
        self.bad = Path(folder) / "bad_steps.jsonl"
        self._writer = jax.process_index() == 0
        if self._writer:
            _forget_after(self.file, start)
            _forget_after(self.bad, start)
            self._lines = open(self.file, "a")
            self._events = Events(folder, purge_step=start + 1 if start else None)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self._writer:
            for file in (self._lines, self._events):
                try:
                    file.close()
                except OSError:
                    # else the run ends for a reason of its own, which is what is said
                    if kind is None:
                        raise

    def write(self, *, stage: str, step: int, total: int, values: dict[str, float]) -> None:
        """One line, and one event a value. step: within the stage; total: of the whole run."""
        if not self._writer:
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
        """One line for a step that was skipped. keys: the records of its batch."""
        if self._writer:
            shown = {
                name: value if math.isfinite(value) else str(value)
                for name, value in values.items()
            }
            with open(self.bad, "a") as file:
                file.write(
                    json.dumps(
                        {"stage": stage, "step": step, "total_step": total, **shown, "keys": keys}
                    )
                    + "\n"
                )

    def image(self, name: str, picture: np.ndarray, total: int) -> None:
        """picture: uint8 [h, w, 3]."""
        if self._writer:
            self._events.image(name, picture, total)
            self._events.flush()


def read(file: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that was cut short is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def device_memory(devices) -> dict[str, float]:
    """GiB in use and at most in use on the fullest of this process's devices; {} where the platform
    does not tell (a CPU)."""
    stats = [
        found
        for device in devices
        if device.process_index == jax.process_index() and (found := device.memory_stats())
    ]
    names = {"device_memory_gib": "bytes_in_use", "device_memory_peak_gib": "peak_bytes_in_use"}
    return {
        name: max(s[key] for s in stats) / 2**30
        for name, key in names.items()
        if stats and all(key in s for s in stats)
    }


def _forget_after(file: Path, total: int) -> None:
    """A killed run logged steps that its last save does not hold; they will be logged again."""
    if file.exists():
        kept = [line for line in read(file) if line["total_step"] <= total]
        part = file.with_name(".metrics.part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        part.replace(file)


def loss_curve(lines: list[dict], size: tuple[int, int] = (960, 480)) -> np.ndarray:
    """uint8 [height, width, 3]: loss (log scale) over total steps, one colour a stage, with its
    range written at the axes."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = size
    left, right, top, bottom = 70, 20, 30, 40
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    points = [
        (line["total_step"], line["loss"], line["stage"])
        for line in lines
        if line.get("loss", 0) > 0
    ]
    if not points:
        return np.asarray(sheet)
    steps, losses = [p[0] for p in points], [math.log10(p[1]) for p in points]
    low, high = min(losses), max(max(losses), min(losses) + 1e-3)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def at(step, loss):
        return (
            left + (width - left - right) * (step - first) / (last - first),
            top + (height - top - bottom) * (high - math.log10(loss)) / (high - low),
        )

    for k in range(5):
        level = low + (high - low) * k / 4
        y = at(first, 10**level)[1]
        draw.line((left, y, width - right, y), fill=(225, 225, 225))
        draw.text((8, y - 8), f"{10**level:.3g}", fill=(90, 90, 90), font=font)
    stages = list(dict.fromkeys(p[2] for p in points))
    colours = [(31, 119, 180), (214, 100, 20), (44, 140, 44), (148, 60, 170), (150, 110, 70)]
    for k, stage in enumerate(stages):
        line = [at(step, loss) for step, loss, name in points if name == stage]
        colour = colours[k % len(colours)]
        draw.line(line if len(line) > 1 else line * 2, fill=colour, width=2)
        draw.text((left + 150 * k, 8), stage, fill=colour, font=font)
    draw.text((left, height - 28), f"step {first}", fill=(90, 90, 90), font=font)
    draw.text((width - 110, height - 28), f"step {last}", fill=(90, 90, 90), font=font)
    return np.asarray(sheet)

"""What a run told of itself, in a few lines at its end."""

from __future__ import annotations

import statistics
from pathlib import Path

from pixart_jax.training.metrics import read


def summary(folder: Path) -> str:
    """A line on the whole run, and one for each stage: images/s and MFU are medians over the logged
    lines."""
    lines, starts = read(folder / "metrics.jsonl"), read(folder / "attempts.jsonl")
    if not lines:
        return "nothing was logged"
    last = lines[-1]
    whole = [f"{last['total_step']} steps"]
    if "goodput" in last:
        whole.append(
            f"goodput {last['goodput']:.0%} of the time since the first start, "
            f"{max(len(starts) - 1, 0)} restarts"
        )
    memory = max((line.get("device_memory_peak_gib", 0.0) for line in lines), default=0.0)
    if memory:
        whole.append(f"device memory at most {memory:.1f} GiB")
    text = [", ".join(whole)]
    for name in dict.fromkeys(line["stage"] for line in lines):
        text.append(f"  {name}: {_stage([line for line in lines if line['stage'] == name])}")
    return "\n".join(text)


def _stage(lines: list[dict]) -> str:
    losses = [line["loss"] for line in lines if "loss" in line]
    parts = [f"{lines[-1]['step']} steps"] + ([f"loss {losses[-1]:.4g}"] if losses else [])
    for name, form in (
        ("images_per_second", "{:.3g} images/s"),
        ("mfu", "MFU {:.1%}"),
        ("data_wait", "{:.1%} waiting for data"),
    ):
        values = [line[name] for line in lines if name in line]
        if values:
            parts.append(form.format(statistics.median(values)))
    parts.append(f"{sum(line.get('skipped', 0) for line in lines)} steps skipped")
    parts.append(f"{max(line.get('recompilations', 0) for line in lines)} recompilations")
    return ", ".join(parts)

"""Which of the T training times an ancestral sampler visits, and the shorter process over those
alone (Improved DDPM, §4)."""

from __future__ import annotations

import numpy as np

from pixart_jax.diffusion.schedule import Schedule
from pixart_jax.errors import UserError


def space_timesteps(timesteps: int, steps: int | str) -> np.ndarray:
    """The times that stay, ascending, int64 [n].

    steps: N or 'N', N times spread evenly from 0 to T − 1, both ends kept ('100' of 1000: 0, 10, …
        505, … 999); 'a,b,c', T cut into that many equal sections with so many times in each, spread
        in the same way; 'ddimN', the smallest whole stride from 0 that gives exactly N times.
    UserError where T does not allow it.
    """
    text = str(steps).strip()
    if text.startswith("ddim"):
        count = _count(text[4:], steps)
        for stride in range(1, timesteps + 1):
            if len(range(0, timesteps, stride)) == count:
                return np.arange(0, timesteps, stride)
        raise UserError(
            f"steps = {steps!r}: no whole stride visits exactly {count} of {timesteps} times"
        )
    counts = [_count(part, steps) for part in text.split(",")]
    size, extra = divmod(timesteps, len(counts))
    times: list[int] = []
    first = 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if count > length:
            raise UserError(f"steps = {steps!r}: a section of {length} times cannot give {count}")
        spacing = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            times.append(first + round(position))
            # summed, not multiplied: published step lists depend on how halves round
            position += spacing
        first += length
    return np.unique(np.asarray(times, np.int64))


def respace_schedule(schedule: Schedule, times: np.ndarray) -> Schedule:
    """The process that visits only ``times`` (ascending) of ``schedule``: ᾱ is the same at each, so
    β_i = 1 − ᾱ_i / ᾱ_{i−1}."""
    kept = schedule.alphas_cumprod[times]
    return Schedule(1.0 - kept / np.concatenate([[1.0], kept[:-1]]))


def _count(text: str, steps: int | str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(
            f"steps = {steps!r}: a whole number of at least 1, 'ddimN', or counts by section such "
            "as '10,15,20'"
        )
    return count

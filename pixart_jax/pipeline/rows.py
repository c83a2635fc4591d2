"""What the images of one call of the pipeline have of their own, and what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.pipeline import editing
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.windows import Windows

DEFAULT_BATCH = 16
Seed = int | str  # of 64 bits; its decimal digits where JSON would round it
Toward = tuple[str, Seed, int, float]  # prompt, seed, index, share of the way


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of a call. index: folded into the seed. canvas: what it is edited from. toward:
    what its text and noise move to, and control: the condition, uint8 [h, w, 3]; all rows of a call
    have one, or none."""

    prompt: str
    negative: str
    seed: int
    index: int
    guidance: float
    canvas: editing.Canvas | None
    toward: Toward | None = None
    control: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What the batches of a call have in common. start: the first step."""

    config: SamplingConfig
    start: int = 0
    reference: bool = False
    windows: Windows | None = None


def one_each(what: str, value, count: int) -> list:
    """One value for all, or a sequence of one a prompt, as a list."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray | jax.Array):
        return [value] * count
    if len(value) != count:
        number = f"{len(value)} {what}s for {count} prompts"
        raise UserError(f"{number}: give one for all, or one each")
    return list(value) if isinstance(value, Sequence) else value.tolist()


def in_batches(
    rows: list[Row], batch_size: int | None, padded: Callable[[int, bool], int]
) -> Iterator[tuple[list[int], list[Row]]]:
    """(positions, their rows) of batches of one size, the last one filled up by its last row; all
    rows of a batch are guided, or none is. padded(size, guided): as devices need."""
    for guided in (True, False):
        group = [n for n, row in enumerate(rows) if (row.guidance != 1) == guided]
        size = padded(batch_size or min(len(group), DEFAULT_BATCH), guided)
        for start in range(0, len(group), size or 1):
            positions = group[start : start + size]
            filled = positions + [positions[-1]] * (size - len(positions))
            yield positions, [rows[n] for n in filled]

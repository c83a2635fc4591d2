"""What the images of one call of the pipeline have of their own, and what they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.pipeline import editing
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.windows import Windows

Seed = int | str  # of 64 bits; its decimal digits where JSON would round it
Toward = tuple[str, Seed, int, float]  # prompt, seed, index, share of the way


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of a call. index: folded into the seed. canvas: what it is edited from. toward:
    what its text and noise move to; all rows of a call have one, or none has."""

    prompt: str
    negative: str
    seed: int
    index: int
    guidance: float
    canvas: editing.Canvas | None
    toward: Toward | None = None

    def with_noise_toward(self, seed: Seed, share: float) -> Row:
        return dataclasses.replace(self, toward=(self.prompt, seed, self.index, share))


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

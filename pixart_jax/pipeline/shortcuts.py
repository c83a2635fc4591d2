"""What a drawing may leave out to be faster. Each changes the image; none is taken unless asked
for.

Guidance costs a second row of the batch, and a step's parts change little from one step to the
next. So

guidance_interval      guides only between two times (arXiv 2404.07724); a step outside costs half.
cross_attention_steps  after so many steps keeps what every block's cross-attention last gave, the
mean of both halves, and ends
                       guidance: the prompt is read no more (T-GATE, arXiv 2404.02747).
blocks_every           computes the blocks at every N-th step and between them adds what they last
gave (FORA, arXiv 2407.01425). schedule               says for each step, block and part whether it
is computed (as ECAD, arXiv 2506.15682, finds them).

The plan of a run is made on the host from its times: which steps are guided, and what of each block
is computed afresh.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from pixart_jax.diffusion import guidance
from pixart_jax.errors import UserError
from pixart_jax.models.transformer import PARTS

CROSS = "cross_attention"


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """guidance_interval: (low, high) in the model's timesteps, 0 … 999. cross_attention_steps: at
    least 1. blocks_every: 1 computes all.
    schedule: a JSON file, a list of steps, each a list of blocks, each [attention, cross_attention,
    mlp], 1 where it is computed."""

    guidance_interval: tuple[float, float] | None = None
    cross_attention_steps: int | None = None
    blocks_every: int = 1
    schedule: str | None = None

    def __post_init__(self):
        if self.guidance_interval is not None:
            low, high = (float(t) for t in self.guidance_interval)
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise UserError(
                    f"guidance interval {low:g} {high:g}: two times of 0 … 999 are needed, the "
                    "lower one first"
                )
            object.__setattr__(self, "guidance_interval", (low, high))
        if self.cross_attention_steps is not None and self.cross_attention_steps < 1:
            raise UserError(
                f"cross-attention steps {self.cross_attention_steps}: at least 1, for there must "
                "be something to keep"
            )
        if self.blocks_every < 1:
            raise UserError(
                f"blocks every {self.blocks_every}: at least 1, which computes them at every step"
            )
        if self.schedule is not None and self.blocks_every > 1:
            raise UserError(
                "blocks every and a schedule of blocks say the same thing: give one of them"
            )

    def settings(self) -> dict:
        """Those that are asked for, as a PNG carries them; a schedule by what is in its file."""
        asked = {
            f.name: value
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default
        }
        if self.guidance_interval is not None:
            asked["guidance_interval"] = list(self.guidance_interval)
        if self.schedule is not None:
            asked["schedule"] = hashlib.sha256(_read(self.schedule)).hexdigest()[:10]
        return asked

    def plan(self, t: np.ndarray, depth: int, guided: bool) -> CachePlan:
        """The plan of a run at the times t [n] of a model of ``depth`` blocks. UserError where a
        schedule does not fit them."""
        steps = np.arange(len(t))
        guides = guidance.within(t, self.guidance_interval) if guided else np.zeros(len(t), bool)
        whole = np.ones((len(t), depth), bool)
        fresh = {}
        if self.schedule is not None:
            given = read_schedule(self.schedule, len(t), depth)
            fresh = {part: given[..., n] for n, part in enumerate(PARTS) if not given[..., n].all()}
        elif self.blocks_every > 1:
            fresh = {part: whole & (steps % self.blocks_every == 0)[:, None] for part in PARTS}
        gate = self.cross_attention_steps
        gated = gate is not None and gate < len(t)
        if gated:
            guides = guides & (steps < gate)
            fresh[CROSS] = fresh.get(CROSS, whole) & (steps < gate)[:, None]
        # the first step of each stretch
        borders = np.flatnonzero(np.diff(guides.astype(int), prepend=2))
        for part, rows in fresh.items():
            # Another number of rows finds nothing to take over; but what the gate kept is carried
            # through to the end.
            rows[[step for step in borders if not (gated and part == CROSS and step >= gate)]] = (
                True
            )
        return CachePlan(guides, {part: rows for part, rows in fresh.items() if not rows.all()})


NONE = CacheConfig()


@dataclasses.dataclass(frozen=True, eq=False)
class CachePlan:
    """guides: bool [n], which steps are guided. fresh: bool [n, depth] of each part that some step
    takes over from an earlier one."""

    guides: np.ndarray
    fresh: dict[str, np.ndarray]

    @property
    def share(self) -> float:
        """Rows of whole evaluations that are computed, of those that guidance at every step would
        compute; parts count alike."""
        rows = 1.0 + self.guides
        computed = sum(
            self.fresh.get(part, np.ones((len(rows), 1))).mean(axis=1) for part in PARTS
        ) / len(PARTS)
        return float((rows * computed).sum() / (2 * len(rows)))


def read_schedule(path: str | os.PathLike, steps: int, depth: int) -> np.ndarray:
    """bool [steps, depth, 3] of a schedule's file. UserError where it is missing, no such list, or
    of another number of steps or blocks."""
    try:
        given = np.asarray(json.loads(_read(path)), dtype=np.float64)
    except (ValueError, TypeError) as fault:
        raise UserError(
            f"block schedule {path} is no JSON list of steps, each of blocks, each of three "
            f"numbers: {fault}"
        ) from None
    if given.shape != (steps, depth, len(PARTS)):
        raise UserError(
            f"block schedule {path} is {list(given.shape)}: want [{steps} steps, {depth} blocks, "
            f"{len(PARTS)} parts]"
        )
    if not np.isin(given, (0, 1)).all():
        raise UserError(
            f"block schedule {path}: every number must be 1 (computed) or 0 (taken over)"
        )
    if not given[0].all():
        raise UserError(
            f"block schedule {path}: the first step has nothing to take over, so all of it must "
            "be 1"
        )
    return given.astype(bool)


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as fault:
        raise UserError(f"block schedule {path}: {fault.strerror or fault}") from None

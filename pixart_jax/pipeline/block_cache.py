"""What sampling may skip or reuse to be faster, at a price in quality; nothing by default.

Guidance costs a second row of the batch, and what a block computes changes little from one step to
the next. The options are fields of SamplingConfig:

guidance_interval      guides only between two times (arXiv 2404.07724); other steps cost half.
cross_attention_steps  after so many steps reuses the last output of every block's cross-attention,
                       the mean of both halves, and ends guidance (T-GATE, arXiv 2404.02747).
blocks_every           computes the blocks at every N-th step and reuses their outputs in between
                       (FORA, arXiv 2407.01425).
block_schedule         says for each step, block and part whether it is computed (as found by ECAD,
                       arXiv 2506.15682).

The plan of a run is made once, on the host, from its times; :func:`segments` wraps the denoiser
accordingly.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.diffusion import Segment, guidance, timesteps
from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.transformer import PARTS, BlockCache
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig

CROSS = "cross_attention"
# (guided, x, conditioning, cache, scales of PAG and control) → (prediction, the outputs of the
# cache's parts)
CachedDenoiser = Callable[..., tuple[jax.Array, dict]]


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """guides: which of the n steps are guided. parts: of each part that some step reuses, (name,
    [n][depth] whether it is computed). Hashable, a static argument of jit."""

    guides: tuple[bool, ...]
    parts: tuple[tuple[str, tuple[tuple[bool, ...], ...]], ...] = ()

    @property
    def recompute(self) -> dict[str, np.ndarray]:
        """bool [n, depth] by part."""
        return {name: np.array(rows) for name, rows in self.parts}

    @property
    def share(self) -> float:
        """The share of rows that is computed, of those with guidance at every step."""
        rows, tables = 1.0 + np.array(self.guides), self.recompute
        whole = np.ones((len(rows), 1))
        computed = sum(tables.get(part, whole).mean(axis=1) for part in PARTS) / len(PARTS)
        return float((rows * computed).sum() / (2 * len(rows)))


def make_plan(
    config: SamplingConfig,
    transformer: TransformerConfig,
    scheduler: SchedulerConfig,
    guided: bool,
    start: int = 0,
) -> CachePlan:
    """The plan of a run from its step ``start`` on. Raises UserError for steps that the solver
    cannot take, or a block schedule that does not fit."""
    solver, schedule, depth = scheduler.solver(config), scheduler.schedule(), transformer.depth
    t = timesteps(solver, config.steps or 0, schedule, config.times, start=start)  # [n]
    steps, whole = np.arange(len(t)), np.ones((len(t), depth), bool)
    guides = guidance.within(t, config.guidance_interval) & guided
    tables: dict[str, np.ndarray] = {}
    if config.block_schedule is not None:
        given = read_schedule(config.block_schedule, len(t), depth)
        tables = {part: given[..., n] for n, part in enumerate(PARTS) if not given[..., n].all()}
    elif config.blocks_every > 1:
        tables = {part: whole & (steps % config.blocks_every == 0)[:, None] for part in PARTS}
    gate = config.cross_attention_steps
    if gate is not None and gate < len(t):
        guides = guides & (steps < gate)
        tables[CROSS] = tables.get(CROSS, whole) & (steps < gate)[:, None]
    # A segment of another batch size finds no outputs to reuse, so its first step computes all; but
    # what the gate froze is carried through to the end.
    first = np.flatnonzero(np.diff(guides.astype(int), prepend=2))
    for part, rows in tables.items():
        frozen = gate is not None and part == CROSS
        rows[[step for step in first if not (frozen and step >= gate)]] = True
    parts = [(part, rows.tolist()) for part, rows in tables.items() if not rows.all()]
    return CachePlan(
        tuple(guides.tolist()), tuple((part, tuple(map(tuple, rows))) for part, rows in parts)
    )


def segments(
    plan: CachePlan,
    denoise: CachedDenoiser,
    shape: tuple[int, int, int, int],  # [depth, b, n, d] of a part's outputs, without guidance
    dtype: jnp.dtype,
    rows: Mapping[bool, int],  # rows of the batch an image, guided and unguided
) -> list[Segment]:
    """The run's segments of guided and unguided steps, with the outputs of the plan's parts as
    their carry. ``per_step`` holds the conditioning, the plan's rows and the scales of PAG and
    control of each step. The copies of a ControlNet are never cached."""
    names = tuple(name for name, _ in plan.parts)

    def step(guided, x, t, per_step, outputs):
        conditioning, recompute, *scales = per_step
        cache = BlockCache(recompute, outputs) if names else None
        return denoise(guided, x, conditioning, cache, *scales)

    found = []
    for guided, count in guidance.run_lengths(np.array(plan.guides)):
        own = (shape[0], shape[1] * rows[guided], *shape[2:])
        enter = functools.partial(_initial_outputs, names, own, dtype)
        found.append(Segment(count, functools.partial(step, guided), enter))
    return found


def _initial_outputs(
    names: tuple[str, ...], shape: tuple[int, ...], dtype, before: dict | None
) -> dict[str, jax.Array]:
    """The outputs that a segment begins with, from those of the segment before it: the mean of both
    halves where guidance ended, which cross-attention reuses from then on; else zeros, never
    read."""

    def initial(outputs):
        if outputs is not None and outputs.shape == shape:
            return outputs
        if outputs is not None and outputs.shape[1] == 2 * shape[1]:
            halves = outputs.reshape(shape[0], 2, *shape[1:])
            return halves.mean(1, dtype=jnp.float32).astype(dtype)
        return jnp.zeros(shape, dtype)

    return {name: initial((before or {}).get(name)) for name in names}


def read_schedule(path: str | os.PathLike, steps: int, depth: int) -> np.ndarray:
    """bool [steps, depth, 3] of a schedule's file. Raises UserError where it is missing, no such
    list, or for another number of steps or blocks."""
    what = f"block schedule {path}"
    try:
        given = np.asarray(json.loads(_read(path)), dtype=np.float64)
    except (ValueError, TypeError) as error:
        form = "no JSON list of steps, each of blocks, each of three numbers"
        raise UserError(f"{what} is {form}: {error}") from None
    if given.shape != (steps, depth, len(PARTS)):
        wanted = f"[{steps} steps, {depth} blocks, {len(PARTS)} parts]"
        raise UserError(f"{what} is {list(given.shape)}: want {wanted}")
    if not np.isin(given, (0, 1)).all():
        raise UserError(f"{what}: every number must be 1 (computed) or 0 (reused)")
    if not given[0].all():
        raise UserError(f"{what}: the first step has nothing to reuse, so all of it must be 1")
    return given.astype(bool)


def schedule_hash(path: str | os.PathLike) -> str:
    """Ten hex digits of a schedule's content."""
    return hashlib.sha256(_read(path)).hexdigest()[:10]


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"block schedule {path}: {error.strerror or error}") from None

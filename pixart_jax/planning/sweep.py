"""Meshes and batch sizes ranked: what arithmetic rules out is not compiled, of the rest the most
promising are."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.models.flops import forward_flops
from pixart_jax.planning import plan as plans
from pixart_jax.planning.compilation import CompileLimits
from pixart_jax.planning.jobs import PlanTarget
from pixart_jax.planning.plan import Plan

WIDEST_TENSOR = 8
WIDEST_CONTEXT = 16
# bytes a parameter of parameters, moments; the EMA's 4 come on top
_STATE = {"adamw": 16, "came": 8}
BATCHES = (1.0, 0.5, 2.0, 0.25, 4.0)  # of the config's, in the order of trust


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One candidate, compiled. fault: why it could not be."""

    job: PlanTarget
    plan: Plan | None
    fault: str = ""


def factorisations(devices: int, slices: int) -> Iterator[tuple[int, int, int, int]]:
    """Every (data, fsdp, context, tensor) whose product is ``devices`` and whose data axis holds
    the slices."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    for fsdp, context, tensor in itertools.product(sizes, repeat=3):
        if devices % (fsdp * context * tensor) == 0:
            data = devices // (fsdp * context * tensor)
            if data % slices == 0:
                yield data, fsdp, context, tensor


def candidates(job: PlanTarget, sizes: bool = True) -> list[PlanTarget]:
    """Jobs worth compiling, the most promising first. sizes: also other batch sizes than the
    config's.

    Ruled out: what plan.check rejects; fsdp that does not divide the model's width, so that its
    parameters would stay whole; tensor over 8, context over 16; a state that alone exceeds the
    device.
    """
    model = plans.geometry(job)
    found: list[tuple[float, PlanTarget]] = []
    own = job.drawing.batch if job.drawing else job.stage_config.batch_size
    for mesh in factorisations(
        job.topology.size, job.topology.slices if job.topology.platform == "tpu" else 1
    ):
        data, fsdp, context, tensor = mesh
        if tensor > WIDEST_TENSOR or context > WIDEST_CONTEXT or (model and model.width % fsdp):
            continue
        unit = data * fsdp * (1 if job.drawing else job.stage_config.optimizer.accumulate)
        batches = dict.fromkeys(
            max(unit, round(own * share / unit) * unit) for share in (BATCHES if sizes else (1.0,))
        )
        for batch in batches:
            other = with_mesh_and_batch(job, mesh, batch)
            try:
                plans.check(other)
            except UserError:
                continue
            if _state(other) > _usable(job):
                continue
            found.append((_promise(other, batch), other))
    return _varied(found)


def _varied(found: list[tuple[float, PlanTarget]]) -> list[PlanTarget]:
    """By promise, halved for each candidate of the same mesh that stands before: another mesh may
    tell more than another batch."""
    before: dict[tuple, int] = {}
    scored = []
    for promise, other in sorted(found, key=lambda pair: -pair[0]):
        count = before.setdefault(other.mesh, 0)
        before[other.mesh] += 1
        scored.append((promise * 0.5**count if promise > 0 else promise - count, other))
    return [other for _, other in sorted(scored, key=lambda pair: -pair[0])]


def with_mesh_and_batch(job: PlanTarget, mesh: tuple[int, int, int, int], batch: int) -> PlanTarget:
    """The same job on another mesh and with another batch."""
    if job.drawing is not None:
        return dataclasses.replace(
            job, mesh=mesh, drawing=dataclasses.replace(job.drawing, batch=batch)
        )
    stages = list(job.config.stages)
    stages[job.stage] = dataclasses.replace(job.stage_config, batch_size=batch)
    return dataclasses.replace(
        job, mesh=mesh, config=dataclasses.replace(job.config, stages=tuple(stages))
    )


def run(
    job: PlanTarget,
    most: int,
    bounds: CompileLimits,
    sizes: bool,
    made: Callable[[PlanTarget, CompileLimits], Plan] = plans.make,
) -> list[Outcome]:
    """Compile the ``most`` most promising candidates; those that fit first, by images/s."""
    todo = candidates(job, sizes)
    if not todo:
        raise UserError(
            f"{job.topology.name}: no mesh of {job.topology.size} devices divides heads, tokens "
            "and batch of this model"
        )
    found = []
    for other in tqdm(todo[:most], desc="compiling", unit="mesh", dynamic_ncols=True):
        try:
            found.append(Outcome(other, made(other, bounds)))
        except UserError as fault:
            found.append(Outcome(other, None, str(fault)))
    left = len(todo) - len(found)
    if left > 0:
        tqdm.write(f"{left} less promising candidates were not compiled (--most {most})")
    return sorted(found, key=_rank)


def _rank(outcome: Outcome) -> tuple:
    p = outcome.plan
    if p is None:
        return (2, 0.0)
    return (0 if p.fits is not False else 1, -(p.images_per_second or 0.0))


def _usable(job: PlanTarget) -> float:
    return job.topology.chip.usable_bytes if job.topology.chip else math.inf


def _parameters(job: PlanTarget) -> float:
    """About: 12 d² for attention, MLP and 4 d² for cross-attention a block."""
    model = plans.geometry(job)
    return 0.0 if model is None else model.depth * 16.0 * model.width**2


def _state(job: PlanTarget) -> float:
    """Bytes a device of parameters, optimizer and EMA, about."""
    a = job.axes
    if job.drawing is not None:
        return 2 * _parameters(job) / (a["fsdp"] * a["tensor"])
    options = job.stage_config.optimizer
    return (
        _parameters(job)
        * (_STATE[options.name] + (4 if options.ema else 0))
        / (a["fsdp"] * a["tensor"])
    )


def _promise(job: PlanTarget, batch: int) -> float:
    """Images/s by rough arithmetic: work evenly shared, weights gathered over fsdp, residual
    streams summed over tensor, keys over context. Less what does not fit by the same rough
    arithmetic."""
    model, chip, a = plans.geometry(job), job.topology.chip, job.axes
    if model is None or chip is None:
        return -sum(size > 1 for size in job.mesh)
    height, width = job.bucket if job.drawing is None else (job.drawing.height, job.drawing.width)
    tokens = (height // 8 // model.patch_size) * (width // 8 // model.patch_size)
    rows = batch / (a["data"] * a["fsdp"])
    flops = (
        4
        * forward_flops(model, height, width, job.stage_config.data.max_text_tokens)
        * batch
        / job.topology.size
    )
    wire = chip.link_bandwidth * max(1, chip.torus)
    sent = 4 * 2 * _parameters(job) / a["tensor"] * (a["fsdp"] > 1)
    stream = 2.0 * rows * tokens / a["context"] * model.width
    sent += model.depth * stream * (8 * (a["tensor"] > 1) + 6 * (a["context"] > 1))
    seconds = flops / (0.5 * chip.peak_bf16_flops) + 0.3 * sent / wire
    kept = model.depth * stream / a["tensor"] ** 0.5 + 4.0 * rows * model.heads * tokens**2 / (
        a["context"] * a["tensor"]
    )
    fits = _state(job) + 4 * _parameters(job) / (a["fsdp"] * a["tensor"]) + kept < chip.usable_bytes
    return batch / seconds * (1.0 if fits else 1e-3)

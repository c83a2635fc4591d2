"""Meshes and batch sizes ranked: the most promising by rough arithmetic are compiled, and those
that fit are ordered by their estimated images/s."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator

from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, TransformerConfig
from pixart_jax.models.flops import forward_flops
from pixart_jax.planning import plan as plans
from pixart_jax.planning.compilation import CompileLimits
from pixart_jax.planning.estimate import OVERLAP, PRODUCT_EFFICIENCY, WIRE_EFFICIENCY
from pixart_jax.planning.plan import Plan
from pixart_jax.planning.target import PlanTarget
from pixart_jax.planning.topology import Topology
from pixart_jax.training.memory import activation_bytes

WIDEST_TENSOR = 8
WIDEST_CONTEXT = 16
BATCHES = (1.0, 0.5, 2.0, 0.25, 4.0)  # of the config's
# Bytes a parameter of the fp32 parameters and the optimizer's moments; an EMA takes 4 more.
_STATE_BYTES = {"adamw": 12, "came": 8}
# The rough arithmetic, with estimate.py's efficiencies. Only the order of candidates rests on it,
# not a figure of the report.
_PASSES = 4  # forward, recomputed forward, and a backward of two
_GATHERS = 4  # of the bf16 weights over fsdp: one a pass, and the gradients' scatter
_TENSOR_SUMS = 8  # of the bf16 stream a block: two all-reduces, each of two transfers, in 2 passes
_CONTEXT_GATHERS = 6  # of the bf16 stream a block: keys and values, in 3 passes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One candidate, compiled. error: why it could not be."""

    target: PlanTarget
    plan: Plan | None
    error: str = ""


def meshes(topology: Topology) -> Iterator[tuple[int, int, int, int]]:
    """Every (data, fsdp, context, tensor) of its devices whose data axis holds the slices."""
    slices = topology.slices if topology.platform == "tpu" else 1
    sizes = [n for n in range(1, topology.size + 1) if topology.size % n == 0]
    for fsdp, context, tensor in itertools.product(sizes, repeat=3):
        data, rest = divmod(topology.size, fsdp * context * tensor)
        if data and not rest and data % slices == 0:
            if context <= WIDEST_CONTEXT and tensor <= WIDEST_TENSOR:
                yield data, fsdp, context, tensor


def candidates(target: PlanTarget, sizes: bool = True) -> list[PlanTarget]:
    """Targets worth compiling, the most promising first. sizes: also other batch sizes than the
    config's.

    Excluded: what plan.check refuses; fsdp that does not divide the model's width, so that its
    parameters would stay whole; tensor over 8, context over 16; a state larger than the device.
    """
    model, found = plans.denoiser(target), []
    micro = 1 if target.sampling else target.stage_config.optimizer.accumulate
    for mesh in meshes(target.topology):
        if model and model.width % mesh[1]:
            continue
        unit = mesh[0] * mesh[1] * micro
        batches = [target.batch * share for share in (BATCHES if sizes else (1.0,))]
        for batch in dict.fromkeys(max(unit, round(n / unit) * unit) for n in batches):
            other = target.with_mesh_and_batch(mesh, batch)
            with contextlib.suppress(UserError):
                plans.check(other)
                if promise := _images_per_second(other, model):
                    found.append((promise, other))
    # Halved for each better batch of the same mesh: another mesh may tell more than another batch.
    seen: collections.Counter = collections.Counter()
    scored = []
    for promise, other in sorted(found, key=lambda pair: -pair[0]):
        scored.append((promise / 2 ** seen[other.mesh], other))
        seen[other.mesh] += 1
    return [other for _, other in sorted(scored, key=lambda pair: -pair[0])]


def _images_per_second(target: PlanTarget, model: TransformerConfig | DiTConfig | None) -> float:
    """Rough images/s: work shared evenly, weights gathered over fsdp, streams summed over tensor,
    keys and values gathered over context. 0 for a state larger than the device; a thousandth where
    the activations do not fit either. Without a chip or a model: fewer split axes are better."""
    chip, axes = target.topology.chip, target.axes
    if model is None or chip is None:
        return 1 / (1 + sum(size > 1 for size in target.mesh))
    stage, config = target.stage_config, target.config
    parameters = model.depth * 16.0 * model.width**2  # attention, MLP 12 d², cross-attention 4 d²
    share = parameters / (axes["fsdp"] * axes["tensor"])
    held = 2 * share
    if target.sampling is None:
        held = share * (_STATE_BYTES[stage.optimizer.name] + 4 * bool(stage.optimizer.ema))
    if held > chip.usable_bytes:
        return 0.0
    if target.sampling is None:
        policy = "full" if config.remat in ("auto", "none") else config.remat
        where = (axes, target.size, target.topology.jax_platform, 4 * share)
        held += sum(activation_bytes(config, stage, policy, *where).values())
    text = stage.data.max_text_tokens
    flops = _PASSES * forward_flops(model, *target.size, text) * target.batch
    stream = 2.0 * target.batch * target.tokens(target.size) * model.width
    stream /= axes["data"] * axes["fsdp"] * axes["context"]
    sent = _GATHERS * 2 * parameters / axes["tensor"] * (axes["fsdp"] > 1)
    blocks = _TENSOR_SUMS * (axes["tensor"] > 1) + _CONTEXT_GATHERS * (axes["context"] > 1)
    sent += model.depth * stream * blocks
    work = flops / target.topology.size / (PRODUCT_EFFICIENCY * chip.peak_bf16_flops)
    links = WIRE_EFFICIENCY * chip.link_bandwidth * max(1, chip.torus)
    seconds = work + (1 - OVERLAP) * sent / links
    return target.batch / seconds * (1.0 if held < chip.usable_bytes else 1e-3)


def run(
    target: PlanTarget,
    limit: int,
    limits: CompileLimits,
    sizes: bool,
    make: Callable[[PlanTarget, CompileLimits], Plan] = plans.make,
) -> list[Outcome]:
    """Compile the ``limit`` most promising candidates; those that fit first, by images/s."""
    todo = candidates(target, sizes)
    if not todo:
        raise UserError(
            f"{target.topology.name}: no mesh of its devices divides heads, tokens and batch"
        )
    found = []
    for other in tqdm(todo[:limit], desc="compiling", unit="mesh", dynamic_ncols=True):
        try:
            found.append(Outcome(other, make(other, limits)))
        except UserError as error:
            found.append(Outcome(other, None, str(error)))
    if left := len(todo) - len(found):
        tqdm.write(f"{left} less promising candidates were not compiled (--most {limit})")

    def rank(outcome: Outcome) -> tuple[int, float]:
        if (plan := outcome.plan) is None:
            return 2, 0.0
        return int(plan.fits is False), -(plan.images_per_second or 0.0)

    return sorted(found, key=rank)

"""A stage's plan: its program compiled, and what follows of it, with the basis of each figure."""

from __future__ import annotations

import dataclasses
import statistics
from types import SimpleNamespace

from pixart_jax.config import StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.flops import forward_flops, train_flops
from pixart_jax.models.geometry import BackboneConfig
from pixart_jax.models.remat import check_platform
from pixart_jax.parallel.mesh import check_divides
from pixart_jax.planning import estimate
from pixart_jax.planning.compilation import CompileLimits, compiled
from pixart_jax.planning.jobs import CompiledStats, PlanTarget


@dataclasses.dataclass(frozen=True)
class Plan:
    """facts: compiled and counted. time, cost: estimates; None where the program does not fit, or
    the chip has no row in the table.

    image_flops: model FLOPs an image, of the compiled bucket; None for a task that has no closed
    form. mean: FLOPs of the mean bucket over those of the compiled one.
    """

    job: PlanTarget
    facts: CompiledStats
    usable: float | None
    image_flops: float | None
    mean: float
    time: estimate.StepTime | None
    cost: estimate.Cost | None

    @property
    def fits(self) -> bool | None:
        """None where nothing is known of the device's memory."""
        return (
            False
            if self.facts.wanted is not None
            else None
            if self.usable is None
            else self.facts.total <= self.usable
        )

    @property
    def batch(self) -> int:
        return self.job.drawing.batch if self.job.drawing else self.job.stage_config.batch_size

    @property
    def seconds(self) -> float | None:
        """Of a step, or of a batch of images: over the mean bucket."""
        return None if self.time is None else self.time.step * self.mean

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None else self.batch / self.seconds

    @property
    def mfu(self) -> float | None:
        if self.time is None or self.image_flops is None:
            return None
        return (
            self.image_flops
            * self.batch
            / self.time.step
            / (self.job.topology.size * self.job.topology.chip.peak_bf16_flops)
        )


def make(job: PlanTarget, bounds: CompileLimits) -> Plan:
    """Compile the job and estimate. UserError where it cannot be compiled."""
    return plan_from_stats(job, compiled(job, bounds))


def plan_from_stats(job: PlanTarget, facts: CompiledStats) -> Plan:
    chip = job.topology.chip
    usable = facts.available or (chip.usable_bytes if chip else None)
    image, mean = model_flops(job)
    time = cost = None
    if chip is not None and facts.wanted is None:
        time = estimate.time_of(job, facts, chip)
        if job.drawing is None:
            hours = job.stage_config.steps * time.step * mean / 3600
            cost = estimate.account(hours, job.topology.size, chip, job.config.hardware)
    return Plan(job, facts, usable, image, mean, time, cost)


def geometry(job: PlanTarget) -> BackboneConfig | None:
    """The denoiser that a stage trains; None for the frozen parts' tasks."""
    stage, model = job.stage_config, job.config.model
    if stage.task == "text_to_image":
        return model
    if stage.task == "class_conditional":
        return DiTConfig(
            **{f.name: getattr(model, f.name) for f in dataclasses.fields(BackboneConfig)},
            num_classes=job.config.num_classes,
        )
    return None


def model_flops(job: PlanTarget) -> tuple[float | None, float]:
    """(model FLOPs an image, the mean bucket's over the compiled one's, equally often drawn)."""
    model = geometry(job)
    if model is None:
        return None, 1.0
    text = job.stage_config.data.max_text_tokens if job.stage_config.task == "text_to_image" else 0
    if job.drawing is not None:
        if job.part != "denoise":
            return None, 1.0
        passes = job.drawing.steps * (2 if job.drawing.guidance != 1 else 1)
        return passes * forward_flops(
            job.config.model, job.drawing.height, job.drawing.width, job.config.model.text_tokens
        ), 1.0
    one = train_flops(model, *job.bucket, text)
    return one, statistics.fmean(
        train_flops(model, *bucket, text) for bucket in job.stage_config.data.buckets
    ) / one


def largest(stage: StageConfig) -> tuple[int, int]:
    """The bucket of the most tokens; the squarest of them."""
    return max(stage.data.buckets, key=lambda b: (b[0] * b[1], -abs(b[0] - b[1])))


def check(job: PlanTarget) -> None:
    """UserError for what can be known to be wrong before anything is compiled: heads, tokens and
    batches that the mesh does not divide."""
    axes, stage = job.axes, job.stage_config
    shards = axes["data"] * axes["fsdp"]
    if axes["data"] % job.topology.slices and job.topology.platform == "tpu":
        raise UserError(
            f"mesh data {axes['data']} is not a multiple of the {job.topology.slices} slices: "
            "slices lie along data"
        )
    if job.drawing is not None:
        if job.drawing.batch % shards:
            raise UserError(
                f"batch size {job.drawing.batch} is not a multiple of {shards} (mesh data "
                f"{axes['data']} × fsdp {axes['fsdp']})"
            )
        tokens = {
            f"{job.drawing.height}×{job.drawing.width}": _tokens(
                job, job.drawing.height, job.drawing.width
            )
        }
    else:
        unit = shards * stage.optimizer.accumulate
        if stage.batch_size % unit:
            near = [
                n
                for n in (stage.batch_size // unit * unit, -(-stage.batch_size // unit) * unit)
                if n
            ]
            parts = (
                f"mesh data {axes['data']} × fsdp {axes['fsdp']} × accumulate "
                f"{stage.optimizer.accumulate}"
            )
            raise UserError(
                f"stage {stage.name}: batch_size {stage.batch_size} is not a multiple of {unit} "
                f"({parts}); "
                f"{' or '.join(map(str, near))} would be (--batch-size)"
            )
        tokens = {f"{h}×{w}": _tokens(job, h, w) for h, w in stage.data.buckets}
    check_platform(
        job.config.remat, {"cuda": "gpu"}.get(job.topology.platform, job.topology.platform)
    )
    model = geometry(job)
    if model is not None:
        mesh = SimpleNamespace(shape=axes)
        check_divides(
            mesh, f"stage {stage.name}", heads=model.heads, mlp_width=model.mlp_width, tokens=tokens
        )


def _tokens(job: PlanTarget, height: int, width: int) -> int:
    side = 8 * job.config.model.patch_size
    return (height // side) * (width // side)

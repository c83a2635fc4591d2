"""A program's plan: compiled, and what follows from it."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import jax

from pixart_jax.config import StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.configs import BackboneConfig, DiTConfig, T5Config, TransformerConfig
from pixart_jax.models.controlnet import config_of
from pixart_jax.models.flops import forward_flops, train_flops
from pixart_jax.models.remat import check_platform
from pixart_jax.parallel.mesh import AXES, check_divides, check_slices
from pixart_jax.planning import estimate
from pixart_jax.planning.compilation import CompileLimits, compiled
from pixart_jax.planning.target import CompiledStats, PlanTarget


@dataclasses.dataclass(frozen=True)
class Plan:
    """usable: bytes that a program may have on a device. image_flops: model FLOPs an image, of the
    compiled bucket; None for a task without a closed form. mean: FLOPs of the mean bucket over the
    compiled one's. time, cost: estimates; None where it does not fit or the chip is unknown."""

    target: PlanTarget
    stats: CompiledStats
    usable: float | None
    image_flops: float | None
    mean: float
    time: estimate.StepTime | None
    cost: estimate.Cost | None

    @property
    def fits(self) -> bool | None:
        """None where the device's memory is not known."""
        if self.stats.wanted is not None:
            return False
        return None if self.usable is None else self.stats.total <= self.usable

    @property
    def seconds(self) -> float | None:
        """Of a step, mean over the buckets, or of a batch of images."""
        return None if self.time is None else self.time.step * self.mean

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None else self.target.batch / self.seconds

    @property
    def mfu(self) -> float | None:
        chip = self.target.topology.chip
        if self.time is None or self.image_flops is None or chip is None:
            return None
        peak = self.target.topology.size * chip.peak_bf16_flops
        return self.image_flops * self.target.batch / self.time.step / peak


def make(target: PlanTarget, limits: CompileLimits) -> Plan:
    """Compile the target and estimate. UserError where it cannot be compiled."""
    return plan_from_stats(target, compiled(target, limits))


def plan_from_stats(target: PlanTarget, stats: CompiledStats) -> Plan:
    chip = target.topology.chip
    usable = stats.available or (chip.usable_bytes if chip else None)
    image, mean = model_flops(target)
    time = cost = None
    if chip is not None and stats.wanted is None:
        time = estimate.time_of(target, stats, chip)
        if target.sampling is None:
            hours = target.stage_config.steps * time.step * mean / 3600
            cost = estimate.cost_of(hours, target.topology.size, chip, target.config.hardware)
    return Plan(target, stats, usable, image, mean, time, cost)


def denoiser(target: PlanTarget) -> TransformerConfig | DiTConfig | None:
    """The config of the denoiser that a stage trains; None for the other tasks."""
    model = target.config.model
    if target.stage_config.task == "class_conditional":
        fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(BackboneConfig)}
        return DiTConfig(**fields, num_classes=target.config.num_classes)
    return model if target.stage_config.reads_text else None


def model_flops(target: PlanTarget) -> tuple[float | None, float]:
    """(model FLOPs an image, the mean over the buckets relative to that)."""
    model, data = denoiser(target), target.stage_config.data
    if model is None or target.part == "decode":
        return None, 1.0
    if (work := target.sampling) is not None:
        text = target.config.model.text_tokens
        return work.evaluations * work.passes * forward_flops(model, *target.size, text), 1.0
    stage = target.stage_config
    text = data.max_text_tokens if stage.reads_text else 0
    copies = config_of(target.config.model).depth if stage.task == "controlnet" else 0
    how: dict[str, Any] = {"frozen": stage.is_adapter, "copies": copies}
    how["others"] = stage.unlearned_evaluations
    one = train_flops(model, *target.bucket, text, **how)
    each = (train_flops(model, *b, text, **how) for b in data.buckets)
    return one, statistics.fmean(each) / one


def largest(stage: StageConfig) -> tuple[int, int]:
    """The bucket of the most tokens; the squarest of them."""
    return max(stage.data.buckets, key=lambda b: (b[0] * b[1], -abs(b[0] - b[1])))


def check(target: PlanTarget) -> None:
    """Raise UserError for slices, batches, heads and tokens that the mesh does not divide."""
    axes, stage = target.axes, target.stage_config
    parts = f"mesh data {axes['data']} × fsdp {axes['fsdp']}"
    shards = axes["data"] * axes["fsdp"]
    if target.topology.platform == "tpu":
        check_slices(axes["data"], target.topology.slices)
    if target.sampling is not None:
        if target.batch % shards:
            raise UserError(f"batch size {target.batch} is not a multiple of {shards} ({parts})")
        sizes: tuple[tuple[int, int], ...] = (target.size,)
    else:
        unit = shards * stage.optimizer.accumulate
        if target.batch % unit:
            near = {target.batch // unit * unit, -(-target.batch // unit) * unit} - {0}
            raise UserError(
                f"stage {stage.name}: batch_size {target.batch} is not a multiple of {unit} "
                f"({parts} × accumulate {stage.optimizer.accumulate}); "
                f"{' or '.join(map(str, sorted(near)))} would be (--batch-size)"
            )
        sizes = stage.data.buckets
    check_platform(target.config.remat, target.topology.jax_platform)
    if (model := denoiser(target)) is not None:
        check_divides(
            jax.sharding.AbstractMesh(target.mesh, AXES),
            f"stage {stage.name}",
            heads=model.heads,
            mlp_width=model.mlp_width,
            tokens={f"{h}×{w}": target.tokens((h, w)) for h, w in sizes},
        )


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """A batch of images: the compiled scan over the steps and VAE decoder, and the counted text
    encoder. text: its seconds for prompts and negative prompts; None for a chip without a row."""

    denoise: Plan
    decode: Plan
    text: float | None

    @property
    def weights(self) -> float:
        """Bytes on a device of all three models."""
        return sum(map(self._counted, ("transformer", "VAE", "text encoder")))

    @property
    def peak(self) -> float:
        """Bytes on a device: all weights, and the larger of the two programs' other needs."""
        denoise = self.denoise.stats.total - self._counted("transformer")
        decode = self.decode.stats.total - self._counted("VAE")
        return self.weights + max(denoise, decode)

    @property
    def without_text_encoder(self) -> float:
        """The peak with the text encoder offloaded, as sample.py does where it does not fit."""
        return self.peak - self._counted("text encoder")

    @property
    def seconds(self) -> float | None:
        if self.text is None or self.denoise.time is None or self.decode.time is None:
            return None
        return self.text + self.denoise.time.step + self.decode.time.step

    def _counted(self, name: str) -> float:
        return self.denoise.stats.counted[name]


def make_sampling(target: PlanTarget, limits: CompileLimits) -> SamplingPlan:
    """Compile both programs of a target with ``sampling``. UserError where one cannot be."""
    denoise = make(target, limits)
    decode = make(dataclasses.replace(target, part="decode"), limits)
    chip, work, text = target.topology.chip, target.sampling, None
    if chip is not None and work is not None:
        from pixart_jax.planning.programs import text_config  # imports every model

        encoder = text_config(target.config, [])
        flops = work.batch * work.passes * t5_flops(encoder, target.config.model.text_tokens)
        rate = target.topology.size * chip.peak_bf16_flops * estimate.PRODUCT_EFFICIENCY
        weights = denoise.stats.counted["text encoder"]
        text = max(flops / rate, weights / (chip.hbm_bandwidth * estimate.MEMORY_EFFICIENCY))
    return SamplingPlan(denoise, decode, text)


def t5_flops(config: T5Config, tokens: int) -> float:
    """Forward FLOPs of one text."""
    inner, d = config.num_heads * config.d_kv, config.d_model
    block = 8 * tokens * d * inner + 4 * tokens**2 * inner + 6 * tokens * d * config.d_ff
    return float(config.num_layers * block)

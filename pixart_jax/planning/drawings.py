"""The plan of a batch of images: the scan over the steps and the VAE's decoder compiled, the text
encoder counted."""

from __future__ import annotations

import dataclasses

from pixart_jax.models.t5 import T5Config
from pixart_jax.planning import estimate, programs, report
from pixart_jax.planning import plan as plans
from pixart_jax.planning.compilation import CompileLimits
from pixart_jax.planning.jobs import PlanTarget
from pixart_jax.planning.plan import Plan


@dataclasses.dataclass(frozen=True)
class DrawingPlan:
    """parts: denoise, then decode. text: seconds of the text encoder for prompts and negative
    prompts; None without a chip."""

    parts: tuple[Plan, Plan]
    text: float | None

    @property
    def weights(self) -> float:
        """Bytes a device of all three models."""
        counted = self.parts[0].facts.counted
        return sum(counted[name] for name in ("transformer", "VAE", "text encoder"))

    @property
    def peak(self) -> float:
        """Bytes a device: all weights, and the larger of the two programs' own needs beside
        them."""
        needs = []
        for part, name in zip(self.parts, ("transformer", "VAE"), strict=True):
            needs.append(part.facts.total - part.facts.counted[name])
        return self.weights + max(needs)

    @property
    def without_text_encoder(self) -> float:
        """The same with the text encoder offloaded, as sample.py does where it does not fit."""
        return self.peak - self.parts[0].facts.counted["text encoder"]

    @property
    def seconds(self) -> float | None:
        if self.text is None or any(part.time is None for part in self.parts):
            return None
        return self.text + sum(part.time.step for part in self.parts)


def make(job: PlanTarget, bounds: CompileLimits) -> DrawingPlan:
    """Compile both programs. UserError where one cannot be."""
    denoise = plans.make(job, bounds)
    decode = plans.make(dataclasses.replace(job, part="decode"), bounds)
    chip = job.topology.chip
    text = None
    if chip is not None:
        config = programs.text_config(job.config, [])
        rows = job.drawing.batch * (2 if job.drawing.guidance != 1 else 1)
        flops = rows * text_flops(config, job.config.model.text_tokens)
        text = flops / (job.topology.size * chip.peak_bf16_flops * estimate.PRODUCT_EFFICIENCY)
        text = max(
            text,
            denoise.facts.counted["text encoder"]
            / (chip.hbm_bandwidth * estimate.MEMORY_EFFICIENCY),
        )
    return DrawingPlan((denoise, decode), text)


def text_flops(config: T5Config, tokens: int) -> float:
    """Of one text through the encoder."""
    inner = config.num_heads * config.d_kv
    block = (
        8 * tokens * config.d_model * inner
        + 4 * tokens**2 * inner
        + 6 * tokens * config.d_model * config.d_ff
    )
    return float(config.num_layers * block)


def text(whole: DrawingPlan) -> str:
    """Both programs, and the batch as a whole."""
    lines = [report.text(part) + "\n" for part in whole.parts]
    usable = whole.parts[0].usable
    rows = [
        ("weights of all models", report.data(whole.weights), report.COUNTED),
        ("peak with the text encoder beside", report.data(whole.peak), report.COMPILED),
        ("peak with it offloaded", report.data(whole.without_text_encoder), report.COMPILED),
    ]
    if usable is not None:
        fits = (
            "fits"
            if whole.peak <= usable
            else "fits with the text encoder offloaded"
            if whole.without_text_encoder <= usable
            else "does not fit"
        )
        rows.append(("the device has", f"{report.data(usable)}: {fits}", report.TABLE))
    if whole.seconds is not None:
        rows += [
            ("text encoder", report.clock(whole.text), report.ESTIMATE),
            ("denoise", report.clock(whole.parts[0].time.step), report.ESTIMATE),
            ("decode", report.clock(whole.parts[1].time.step), report.ESTIMATE),
            ("a batch", report.clock(whole.seconds), report.ESTIMATE),
            ("images/s", f"{whole.parts[0].batch / whole.seconds:,.2f}", report.ESTIMATE),
        ]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines.append(f"a batch of {whole.parts[0].batch} images, a device")
    lines += [f"  {what:{first}}  {figure:{second}}  {basis}" for what, figure, basis in rows]
    return "\n".join([*lines, "", report.LEGEND])


def as_json(whole: DrawingPlan) -> dict:
    """The batch as a whole."""
    found = {
        "weights": whole.weights,
        "peak": whole.peak,
        "peak_without_text_encoder": whole.without_text_encoder,
    }
    if whole.seconds is not None:
        found |= {
            "seconds": whole.seconds,
            "text_seconds": whole.text,
            "images_per_second": whole.parts[0].batch / whole.seconds,
        }
    return found

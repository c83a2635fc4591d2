"""Resolution binning, and whether options can be used with a model: a size that a model never saw
is generated at the nearest one of its bucket table, then fitted to what was asked for."""

from __future__ import annotations

from typing import NamedTuple

from pixart_jax.data import buckets
from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig, VAEConfig
from pixart_jax.pipeline.block_cache import make_plan
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.pipeline.windows import plan_windows


class ImageSize(NamedTuple):
    """(height, width) in pixels: what was asked for, and what is generated."""

    asked: tuple[int, int]
    generated: tuple[int, int]


def check_options(
    config: SamplingConfig,
    transformer: TransformerConfig,
    vae: VAEConfig,
    scheduler: SchedulerConfig,
    height: int | None = None,
    width: int | None = None,
    *,
    batch_size: int | None = None,
    start: int = 0,
) -> ImageSize:
    """The size of the images, by default the side that the model was trained at. config: with its
    defaults filled in. start: the step that an edit starts at.

    Raises UserError, naming a value that would do, for options that this model cannot be sampled
    with; the configs suffice, so it comes before any weight is read.
    """
    side = transformer.sample_size * vae.factor
    asked = side if height is None else height, side if width is None else width
    binned = config.binning and not config.windowed and side in buckets.INFERENCE_TABLES
    unit = vae.factor * (1 if binned else transformer.patch_size)
    for name, value in zip(("height", "width"), asked):
        if value < unit or value % unit:
            fits = max(unit, (value + unit // 2) // unit * unit)
            why = "" if binned else f" ({vae.factor} × patch size {transformer.patch_size})"
            raise UserError(
                f"{name} {value}: a side must be a multiple of {unit}{why}; {fits} would do"
            )
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least 1 is needed")
    if (config.text_length or 0) > transformer.text_tokens:
        limit = transformer.text_tokens
        raise UserError(f"text length {config.text_length}: this model reads at most {limit}")
    config.perturbed_layers(transformer.depth)
    make_plan(config, transformer, scheduler, guided=config.guidance != 1, start=start)
    if not binned:
        plan_windows(config, transformer, tuple(side // vae.factor for side in asked))
        return ImageSize(asked, asked)
    return ImageSize(asked, buckets.nearest(*asked, side, inference=True))

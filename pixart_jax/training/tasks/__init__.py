"""What a stage learns, one task a file.

Every task has: ``module``, its Flax model; ``init(key)`` → boxed parameters, also for
jax.eval_shape; ``on_stage_start(params, base)`` → the plain parameters a stage begins with;
``losses(params, batch, keys, base)`` → values a sample, [b] each, of which "loss" is minimised;
``preview(params, batch, settings, base)`` → images (uint8 [h, w, 3]) and their captions;
``export(params, folder, batches)``, which writes the model as a part of a diffusers folder, with
batches: step → batch for what has to be measured. base: what an OverBase reads, else None.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jax.sharding import Mesh

from pixart_jax.config import Config, StageConfig
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.tasks.autoencoder import Autoencoder
from pixart_jax.training.tasks.class_conditional import ClassConditional
from pixart_jax.training.tasks.controlnet import TextToImageControl
from pixart_jax.training.tasks.distillation import (
    ConsistencyDistillation,
    Distillation,
    TrajectoryDistillation,
)
from pixart_jax.training.tasks.lora import TextToImageLora
from pixart_jax.training.tasks.text_to_image import TextToImage
from pixart_jax.training.tasks.text_to_text import TextToText

Task = (
    ClassConditional
    | TextToImage
    | TextToImageLora
    | TextToImageControl
    | Distillation
    | Autoencoder
    | TextToText
)

TASKS: dict[str, type[Task]] = {
    "class_conditional": ClassConditional,
    "text_to_image": TextToImage,
    "controlnet": TextToImageControl,
    "lcm": ConsistencyDistillation,
    "tdm": TrajectoryDistillation,
    "autoencoder": Autoencoder,
    "text_to_text": TextToText,
}


@runtime_checkable
class OverBase(Protocol):
    """A task that also reads parameters that it does not train, which the compiled step never
    donates: an adapter's base, a teacher."""

    def base_boxed(self) -> Any:
        """Their shapes, boxed with axis names."""

    def base_shapes(self, mesh: Mesh) -> Any:
        """Their shapes with shardings, in the dtypes that they are held in."""

    def load_base(self, mesh: Mesh) -> Any:
        """Their arrays on the mesh."""


def make_task(config: Config, stage: StageConfig, frozen: Frozen) -> Task:
    """The task of a stage, its model built. Raises UserError where config and task do not fit."""
    kind = TextToImageLora if stage.lora and stage.task == "text_to_image" else TASKS[stage.task]
    return kind.from_config(config, stage, jnp.dtype(config.compute_dtype), frozen)

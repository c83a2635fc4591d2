"""What a stage learns, one task a file: parameters, losses a sample, pictures to look at, and what is left behind at the end."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from pixart_jax.config import Config, PreviewConfig, StageConfig


class Task(Protocol):
    """The interface that the loop knows."""

    def init(self, key: jax.Array) -> Any:
        """Fresh boxed parameters; also for jax.eval_shape."""

    def losses(self, params, batch: dict[str, jax.Array], keys: jax.Array) -> dict[str, jax.Array]:
        """One value a sample, [b] each; "loss" is what is minimised. keys: [b], a random key a sample."""

    def preview(self, params, batch: dict, settings: PreviewConfig) -> tuple[list, list[str]]:
        """Pictures (uint8 [h, w, 3]) and their captions; ([], []) for a task without any."""

    def export(self, params, folder) -> None:
        """Write what was learned as a part of a diffusers folder."""


def make_task(config: Config, stage: StageConfig, tokenizer=None) -> Task:
    """The task of a stage, its models built and its frozen parts opened."""
    import jax.numpy as jnp

    dtype = jnp.dtype(config.compute_dtype)
    if stage.task == "autoencoder":
        from pixart_jax.training.tasks.autoencoder import make
    elif stage.task == "masked_text":
        from pixart_jax.training.tasks.masked_text import make
    elif stage.task == "class_conditional":
        from pixart_jax.training.tasks.class_conditional import make
    else:
        from pixart_jax.training.tasks.text_to_image import make
    return make(config, stage, dtype, tokenizer)

"""What a stage learns, one task a file: parameters, losses a sample, pictures to look at, and what
is left behind at the end."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pixart_jax.config import Config, PreviewConfig, StageConfig
from pixart_jax.training.frozen import Frozen


class Task(Protocol):
    """The interface that the loop knows."""

    def init(self, key: jax.Array) -> Any:
        """Fresh boxed parameters; also for jax.eval_shape."""

    def adjust(self, params) -> Any:
        """The plain parameters a stage begins with, from those it was given or made."""

    def losses(self, params, batch: dict[str, jax.Array], keys: jax.Array) -> dict[str, jax.Array]:
        """One value a sample, [b] each; "loss" is what is minimised. keys: [b], a random key a
        sample."""

    def preview(self, params, batch: dict, settings: PreviewConfig) -> tuple[list, list[str]]:
        """Pictures (uint8 [h, w, 3]) and their captions; ([], []) for a task without any."""

    def export(self, params, folder, batches) -> None:
        """Write what was learned as a part of a diffusers folder. batches: step → batch, the
        stage's own, for what has to be measured."""


def make_task(config: Config, stage: StageConfig, frozen: Frozen) -> Task:
    """The task of a stage, its model built. Raises UserError where config and task do not fit."""
    # StageConfig.task names only files that are here
    module = importlib.import_module(f"pixart_jax.training.tasks.{stage.task}")
    return module.make(config, stage, jnp.dtype(config.compute_dtype), frozen)

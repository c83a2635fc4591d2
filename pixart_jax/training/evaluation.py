"""Metrics during a stage (config.EvaluateConfig): the loss of held-out records, and those of images
that package evaluation measures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pixart_jax.config import Config, PreviewConfig, StageConfig
from pixart_jax.data.loader import Loader
from pixart_jax.data.sources import parse_source
from pixart_jax.errors import UserError
from pixart_jax.parallel import rules
from pixart_jax.training.batches import Encode, open_loader, put
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.stages import StageParts
from pixart_jax.training.state import TrainState
from pixart_jax.training.tasks import TextToImageLora

Evaluator = Callable[[TrainState], dict[str, float]]
# a batch whose images' size counts, and settings with the prompts ((): the batch's own) → uint8
# images [h, w, 3]
Generate = Callable[[Mapping[str, Any], PreviewConfig], Sequence[np.ndarray]]
OpenMetric = Callable[..., Callable[[Generate], dict[str, float]]]
"""(metric, config, stage, frozen, held_out) → what measures images; held_out() opens the loader of
held-out records. Injected by commands/train.py, because training may not import evaluation."""


def open_evaluators(
    config: Config,
    index: int,
    parts: StageParts,
    frozen: Frozen,
    encode: Encode | None,
    mesh: Mesh,
    open_metric: OpenMetric | None = None,
) -> dict[str, Evaluator]:
    """The evaluators of stage ``index`` by metric; {} where it evaluates nothing."""
    stage, found = config.stages[index], {}

    @functools.cache
    def held_out() -> Loader:
        return open_loader(_of_held_out(config, index), index, frozen, encode, mesh)

    def of_images(measure: Callable[[Generate], dict[str, float]], state: TrainState):
        def generate(batch: Mapping[str, Any], settings: PreviewConfig) -> Sequence[np.ndarray]:
            return parts.task.preview(state.average, batch, settings, parts.base)[0]

        return measure(generate)

    for name in stage.evaluate.metrics if stage.evaluate.every else ():
        if name == "loss":
            found[name] = loss_evaluator(stage, parts, held_out(), mesh)
        elif open_metric is None:
            raise UserError(f"stage {stage.name}: {name} is measured by train.py alone")
        else:
            measure = open_metric(name, config, stage, frozen, held_out)
            found[name] = functools.partial(of_images, measure)
    return found


def _of_held_out(config: Config, index: int) -> Config:
    """The config with the held-out records of stage ``index`` as its data."""
    stage = config.stages[index]
    options, data = stage.evaluate, stage.data
    if options.source is not None:
        data = dataclasses.replace(data, source=options.source, where=None)
    default = "test" if options.source is None else "train"
    data = dataclasses.replace(data, split=options.split or default, limit=None)
    if parse_source(data.source)[0] not in ("records", "pixart-features"):
        data = dataclasses.replace(data, limit=options.count, shuffle_shards=0)
    held_out = dataclasses.replace(stage, data=data, dreambooth=None)
    stages = (*config.stages[:index], held_out, *config.stages[index + 1 :])
    return dataclasses.replace(config, stages=stages)


def loss_evaluator(stage: StageConfig, parts: StageParts, loader: Loader, mesh: Mesh) -> Evaluator:
    """The means of the task's losses over held-out records, without dropout in an adapter.

    Batch k is that of step k of the held-out set, and its noise and times come from a fixed key
    with k folded in, so that two evaluations differ by the parameters alone.
    """
    task = parts.task
    if isinstance(task, TextToImageLora) and stage.lora is not None:
        task = task.with_lora(dropout=0.0)
    batches = max(1, stage.evaluate.count // stage.batch_size)
    sharding = rules.batch_sharding(mesh)

    def means(params, batch, key, base):
        keys = jax.random.split(key, stage.batch_size)
        losses = task.losses(params, batch, keys, base)
        return jax.tree.map(lambda x: jnp.mean(x, dtype=jnp.float32), losses)

    compiled = jax.jit(means, out_shardings=rules.replicated(mesh))

    def evaluate(state: TrainState) -> dict[str, float]:
        totals: dict[str, float] = {}
        rows = loader.iterator()
        try:
            for number in range(batches):
                key = jax.random.fold_in(jax.random.key(0), number)
                with rules.on_mesh(mesh, rules.ACTIVATION_RULES):
                    found = compiled(state.average, put(next(rows), sharding), key, parts.base)
                for name, value in jax.device_get(found).items():
                    totals[name] = totals.get(name, 0.0) + float(value) / batches
        finally:
            rows.close()
        return totals

    return evaluate

"""Metrics of held-out records during a stage (config.EvaluateConfig)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pixart_jax.config import Config
from pixart_jax.data.sources import parse_source
from pixart_jax.parallel import rules
from pixart_jax.training.batches import Encode, open_loader, put
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.stages import StageParts
from pixart_jax.training.state import TrainState
from pixart_jax.training.tasks import TextToImageLora, given

Evaluator = Callable[[TrainState], dict[str, float]]


def open_evaluators(
    config: Config, index: int, parts: StageParts, frozen: Frozen, encode: Encode | None, mesh: Mesh
) -> dict[str, Evaluator]:
    """The evaluators of stage ``index`` by metric; {} where it evaluates nothing."""
    if not config.stages[index].evaluate.every:
        return {}
    return {"loss": loss_evaluator(config, index, parts, frozen, encode, mesh)}


def loss_evaluator(
    config: Config, index: int, parts: StageParts, frozen: Frozen, encode: Encode | None, mesh: Mesh
) -> Evaluator:
    """The means of the task's losses over held-out records, without dropout in an adapter.

    Batch k is that of step k of the held-out set, and its noise and times come from a fixed key
    with k folded in, so that two evaluations differ by the parameters alone.
    """
    stage, task = config.stages[index], parts.task
    if isinstance(task, TextToImageLora):
        task = task.without_dropout()
    options, data = stage.evaluate, stage.data
    if options.source is not None:
        data = dataclasses.replace(data, source=options.source, where=None)
    default = "test" if options.source is None else "train"
    data = dataclasses.replace(data, split=options.split or default, limit=None)
    if parse_source(data.source)[0] not in ("records", "pixart-features"):
        data = dataclasses.replace(data, limit=options.count)
    held_out = dataclasses.replace(stage, data=data, dreambooth=None)
    stages = (*config.stages[:index], held_out, *config.stages[index + 1 :])
    loader = open_loader(dataclasses.replace(config, stages=stages), index, frozen, encode, mesh)
    batches = max(1, options.count // stage.batch_size)
    sharding = rules.batch_sharding(mesh)

    def means(params, batch, key, base):
        keys = jax.random.split(key, stage.batch_size)
        losses = task.losses(params, batch, keys, *given(base))
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

"""The first state of a stage: fresh, from the stage before, or from a folder of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pixart_jax.config import Config, StageConfig
from pixart_jax.data.loader import Loader
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, T5Config, TransformerConfig
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.training.reparameterization import from_dit, reparameterization_error
from pixart_jax.training.stages import StageParts
from pixart_jax.training.state import TrainState, fresh_params, state_from
from pixart_jax.training.tasks import Task, given
from pixart_jax.weights.component import load_component
from pixart_jax.weights.hub import model_folder
from pixart_jax.weights.table import flatten, unflatten

# What given weights may lack: the parts that a multi-scale model has beyond a plain one, the null
# caption, for which diffusers' files have no place, and the decoder that trains a text encoder.
_ADDABLE = ("size_embedder/", "ratio_embedder/", "null_caption", "decoder/")

Report = Callable[[str, dict], None]
"""(name, figures): receives the figures of a conversion."""


class Trained(NamedTuple):
    """A stage that was trained, with its averaged parameters."""

    task: Task
    params: Any
    loader: Loader


def initial_state(
    config: Config, index: int, parts: StageParts, previous: Trained | None, report: Report
) -> TrainState:
    """The state before the first step of stage ``index``. previous: the stage before."""
    key = jax.random.fold_in(jax.random.key(config.seed), index)

    def fresh():
        return fresh_params(parts.task.init, key, parts.abstract)

    if parts.base is not None:  # an adapter or a student: what the stage starts from is its base
        params = fresh()
    else:
        params = initial_params(config, index, parts.task, previous, fresh, key, report)
    params = parts.task.on_stage_start(params, *given(parts.base))
    return state_from(params, parts.optimizer, parts.abstract)


def initial_params(
    config: Config, index: int, task: Task, previous, fresh, key: jax.Array, report: Report
):
    """Parameters (plain tree) of the first step of stage ``index``. fresh: () → new parameters on
    the mesh.

    A stage that follows takes the EMA of the one before: the weights that its samples were drawn
    with.
    """
    stage = config.stages[index]
    if stage.start == "fresh" or (stage.start == "previous" and index == 0):
        return fresh()
    if stage.start == "previous":
        kind, model = config.stages[index - 1].task, previous.task.module.config
        params = previous.params
    else:
        kind, model, params = load_start(stage)
    return convert_params(stage, kind, model, params, task, fresh, key, report)


def start_folder(stage: StageConfig) -> Path:
    """The folder of the component that a stage starts from; of a hub id, after its download."""
    part = {"autoencoder": "vae", "text_to_text": "text_encoder"}.get(stage.task, "transformer")
    folder = model_folder(stage.start, (part,))
    return folder / part if (folder / part).is_dir() else folder


def load_start(stage: StageConfig):
    """(task, model config, parameters) of the folder that a stage names: a part's own, or a
    model's."""
    component = load_component(start_folder(stage))
    kinds: dict[type, str] = {
        TransformerConfig: "text_to_image",
        DiTConfig: "class_conditional",
        T5Config: "text_to_text",
    }
    kind, params = kinds.get(type(component.config), "autoencoder"), component.params
    return kind, component.config, {"encoder": params} if kind == "text_to_text" else params


def convert_params(
    stage: StageConfig, kind: str, model, params, task, fresh, key: jax.Array, report: Report
):
    """Parameters of a model of task ``kind`` in the form of the stage's task."""
    if kind == "class_conditional" and stage.task == "text_to_image":
        old, ours = jax.tree.map(gather_to_host, params), task.module.config
        params = from_dit(old, model, ours, key)
        height, width = stage.data.buckets[0]
        shape = (2, height // 8, width // 8, model.in_channels)
        latents = jax.random.normal(jax.random.fold_in(key, 1), shape)
        error = reparameterization_error(old, model, params, ours, latents)
        report("reparameterization", error.summary())
    elif kind != stage.task:
        raise UserError(
            f"stage {stage.name}: task {stage.task} cannot start from a model of task {kind}"
        )
    return complete_params(stage, params, fresh)


def complete_params(stage: StageConfig, params, fresh):
    """The given parameters, checked against the stage's model, with fresh ones for what they may
    lack."""
    given: dict[str, Any] = flatten(params)
    wanted: dict[str, Any] = flatten(jax.eval_shape(fresh))
    missing = [path for path in wanted if path not in given]
    extra = [path for path in given if path not in wanted]
    wrong = [
        f"{path} {tuple(given[path].shape)} for {tuple(wanted[path].shape)}"
        for path in wanted
        if path in given and given[path].shape != wanted[path].shape
    ]
    addable = all(path.startswith(_ADDABLE) for path in missing)
    if extra or wrong or not addable:
        kinds = {"missing": missing, "left over": extra, "of another shape": wrong}
        what = [f"{len(n)} {name}: {', '.join(n[:3])}" for name, n in kinds.items() if n]
        raise UserError(f"stage {stage.name} cannot start from these weights ({'; '.join(what)})")
    if missing:
        new: dict[str, Any] = flatten(fresh())
        # The embedders' last layer is set to zero, so that the model begins as the plain one.
        given |= {
            path: np.zeros(new[path].shape, new[path].dtype) if "/fc2/" in path else new[path]
            for path in missing
        }
    return unflatten(given)

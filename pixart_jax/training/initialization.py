"""What a stage starts from: nothing, the stage before, or a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from pixart_jax.config import Config, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.t5 import T5Config
from pixart_jax.models.transformer import TransformerConfig
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.training.reparameterization import from_dit, reparameterization_error
from pixart_jax.weights.component import load_component
from pixart_jax.weights.table import flatten, unflatten

# What given weights may lack: the parts that a multi-scale model has beyond a plain one, the null
# caption, for which diffusers' files have no place, and the decoder that a text encoder is trained
# with.
_ADDABLE = ("size_embedder/", "ratio_embedder/", "null_caption", "decoder/")


def initial_params(
    config: Config,
    index: int,
    task,
    previous,
    fresh,
    key: jax.Array,
    report: Callable[[str, dict], None],
):
    """Parameters (plain tree) of the first step of stage ``index``.

    task: the stage's. previous: (task, averaged parameters) of the stage before, or None. fresh: ()
    → new parameters on the mesh. report(name, figures): told how well a conversion went.

    A stage that follows takes the EMA of the one before: the weights that its samples were drawn
    with.
    """
    stage = config.stages[index]
    if stage.start == "fresh" or (stage.start == "previous" and index == 0):
        return fresh()
    if stage.start == "previous":
        before, params = previous
        kind = config.stages[index - 1].task
        return convert_params(stage, kind, before.module.config, params, task, fresh, key, report)
    kind, model, params = load_start(stage)
    return convert_params(stage, kind, model, params, task, fresh, key, report)


def load_start(stage: StageConfig):
    """(task, model config, parameters) of the folder that a stage names: a part's own, or a
    model's."""
    folder = Path(stage.start)
    part = {"autoencoder": "vae", "text_to_text": "text_encoder"}.get(stage.task, "transformer")
    component = load_component(folder / part if (folder / part).is_dir() else folder)
    kinds = {
        TransformerConfig: "text_to_image",
        DiTConfig: "class_conditional",
        T5Config: "text_to_text",
    }
    kind = kinds.get(type(component.config), "autoencoder")
    return (
        kind,
        component.config,
        {"encoder": component.params} if kind == "text_to_text" else component.params,
    )


def convert_params(
    stage: StageConfig, kind: str, model, params, task, fresh, key: jax.Array, report
):
    """Parameters of a model of task ``kind`` as the stage's task needs them."""
    if kind == "class_conditional" and stage.task == "text_to_image":
        old = jax.tree.map(gather_to_host, params)
        params = from_dit(old, model, task.module.config, key)
        height, width = stage.data.buckets[0]
        latents = jax.random.normal(
            jax.random.fold_in(key, 1), (2, height // 8, width // 8, model.in_channels)
        )
        report(
            "reparameterization",
            reparameterization_error(old, model, params, task.module.config, latents).summary(),
        )
    elif kind != stage.task:
        raise UserError(
            f"stage {stage.name}: task {stage.task} cannot start from a model of task {kind}"
        )
    return complete_params(stage, params, task, fresh)


def complete_params(stage: StageConfig, params, task, fresh):
    """The given parameters, checked against the stage's model; what they may lack is made."""
    given = flatten(params)
    wanted = flatten(jax.eval_shape(fresh))
    missing = [path for path in wanted if path not in given]
    extra = [path for path in given if path not in wanted]
    wrong = [
        f"{path} {tuple(given[path].shape)} for {tuple(wanted[path].shape)}"
        for path in wanted
        if path in given and given[path].shape != wanted[path].shape
    ]
    addable = missing and all(path.startswith(_ADDABLE) for path in missing)
    if extra or wrong or (missing and not addable):
        what = [
            f"{len(found)} {name}: {', '.join(found[:3])}"
            for name, found in (
                ("missing", missing),
                ("left over", extra),
                ("of another shape", wrong),
            )
            if found
        ]
        raise UserError(f"stage {stage.name} cannot start from these weights ({'; '.join(what)})")
    if missing:
        made = flatten(fresh())
        # The embedders' last layer is put to zero, so that the model begins as the plain one that
        # it was.
        given |= {
            path: np.zeros(made[path].shape, made[path].dtype) if "/fc2/" in path else made[path]
            for path in missing
        }
    return unflatten(given)

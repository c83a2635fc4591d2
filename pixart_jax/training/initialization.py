"""The first state of a stage: fresh, from the stage before, or from a folder of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import Config, StageConfig
from pixart_jax.data.loader import Loader
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, T5Config, TransformerConfig
from pixart_jax.models.embedders import ScalarEmbedder
from pixart_jax.parallel.gather import gather_to_host
from pixart_jax.training.frozen import start_folder
from pixart_jax.training.reparameterization import from_dit, reparameterization_error
from pixart_jax.training.stages import StageParts
from pixart_jax.training.state import TrainState, fresh_params, state_from
from pixart_jax.training.tasks import Task
from pixart_jax.weights.component import load_component
from pixart_jax.weights.files import read_json
from pixart_jax.weights.table import flatten, unflatten
from pixart_jax.weights.vae import config_from_json

# What given weights may lack: what a multi-scale model or PixArt-Σ has beyond a plain one, the null
# caption, for which diffusers' files have no place, and the decoder that trains a text encoder.
_SIZES = ("size_embedder/", "ratio_embedder/")
_NORMS = ("blocks/attn/q_norm/", "blocks/attn/k_norm/")
_ADDABLE = (*_SIZES, *_NORMS, "kv_compression/", "null_caption", "decoder/")
_OF_VAE = ("latent_channels", "scaling_factor", "shift_factor")
# what has the latents' channels in its shape: [p, p, c, d], [d, p·p·c'], [p·p·c']
_PER_CHANNEL = ("patch_embedder/kernel", "final/kernel", "final/bias")

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
    params = parts.task.on_stage_start(params, parts.base)
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
    if kind == stage.task and stage.reads_text and jax.process_index() == 0:
        _report_vae(stage, task, previous)
    return convert_params(stage, kind, model, params, task, fresh, key, report)


def _report_vae(stage: StageConfig, task: Any, previous: Any) -> None:
    """Print how the VAE differs from the one that the weights were trained with, if it is known."""
    if stage.start == "previous":
        old = previous.task.frozen.vae_config
    else:
        path = start_folder(stage).parent / "vae" / "config.json"
        old = config_from_json(read_json(path)) if path.is_file() else None
    new = task.frozen.vae_config if old is not None else None
    pairs = [(name, getattr(old, name, None), getattr(new, name, None)) for name in _OF_VAE]
    changed = [f"{name} {before} → {after}" for name, before, after in pairs if before != after]
    if changed:
        print(f"stage {stage.name}: another VAE ({', '.join(changed)}), for which nothing is reset")


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
    """The given parameters, checked against the stage's model and changed to fit it, as from
    PixArt-α to PixArt-Σ: docs/sigma.md. Each change is a printed line."""
    given, wanted = dict[str, Any](flatten(params)), dict[str, Any](flatten(jax.eval_shape(fresh)))
    changes = []
    sized = [path for path in given if path.startswith(_SIZES) and path not in wanted]
    if sized:
        given = without_sizes(params, stage.data.buckets)
        changes.append("size embedders dropped: their mean over the buckets is the timestep's bias")
    missing = [path for path in wanted if path not in given]
    extra = [path for path in given if path not in wanted]
    shapes = {p: (given[p].shape, wanted[p].shape) for p in wanted if p in given}
    wrong = {path: pair for path, pair in shapes.items() if pair[0] != pair[1]}
    fits = {path for path, (old, new) in wrong.items() if _fits(path, old, new)}
    if _PER_CHANNEL[0] not in fits:  # another prediction of the same latents
        fits -= set(_PER_CHANNEL)
    unfit = [f"{path} {old} for {new}" for path, (old, new) in wrong.items() if path not in fits]
    if extra or unfit or not all(path.startswith(_ADDABLE) for path in missing):
        kinds = {"missing": missing, "left over": extra, "of another shape": unfit}
        what = [f"{len(n)} {name}: {', '.join(n[:3])}" for name, n in kinds.items() if n]
        raise UserError(f"stage {stage.name} cannot start from these weights ({'; '.join(what)})")
    added = [part for part in _ADDABLE if any(path.startswith(part) for path in missing)]
    changes += [f"{part.strip('/')} added" for part in added]
    if missing or wrong:
        new: dict[str, Any] = flatten(fresh())
        # The embedders' last layer is set to zero, so that the model begins as the plain one.
        zero = {path for path in missing if "/fc2/" in path}
        changed = {
            p: np.zeros(new[p].shape, new[p].dtype) if p in zero else new[p] for p in missing
        }
        changed |= {path: new[path] for path in wrong}
        if "null_caption" in wrong:
            before, after = (len(of["null_caption"]) for of in (given, new))
            kept = gather_to_host(given["null_caption"])[:after]
            rest = gather_to_host(new["null_caption"])[len(kept) :]
            changed["null_caption"] = np.concatenate([kept, rest])
            changes.append(f"null caption {before} → {after} tokens, the first {len(kept)} kept")
        if _PER_CHANNEL[0] in wrong:
            before, after = (of[_PER_CHANNEL[0]].shape[2] for of in (given, new))
            changes.append(f"latents {before} → {after} channels: first and last layer are new")
        given |= changed
    if jax.process_index() == 0:
        for change in changes:
            print(f"stage {stage.name}: {change}")
    return unflatten(given)


def _fits(path: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Whether a parameter of another shape may be replaced."""
    if path == "patch_embedder/kernel":
        return (*old[:2], old[3]) == (*new[:2], new[3])
    if path == "final/kernel":
        return old[0] == new[0]
    return path == "final/bias" or (path == "null_caption" and old[1:] == new[1:])


def without_sizes(params, buckets) -> dict[str, Any]:
    """Flat parameters of a multi-scale model without its size and ratio embedders, whose output, a
    vector added to that of the timestep's, goes into the bias there as its mean over ``buckets``
    [n] (height, width): the same function where there is one bucket."""
    flat = dict[str, Any](flatten(params))
    embedded = [flat.pop(path) for path in list(flat) if path.startswith(_SIZES)]
    width = embedded[0].shape[-1]
    size = np.array(buckets, np.float32)

    def embed(name, values):
        return ScalarEmbedder(width).apply({"params": params[name]}, values)

    sizes = embed("size_embedder", size).reshape(len(size), -1)
    mean = jnp.concatenate([sizes, embed("ratio_embedder", size[:, 0] / size[:, 1])], -1).mean(0)
    flat["timestep_embedder/fc2/bias"] = flat["timestep_embedder/fc2/bias"] + mean
    return flat

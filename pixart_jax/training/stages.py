"""The parts of a stage: its task, optimizer and state, the state as shapes with shardings.

A run fills the shapes with arrays; the planner compiles the same step from shapes alone, for
hardware that is not at hand. Both build a stage here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pixart_jax.config import Config, StageConfig
from pixart_jax.models.remat import AUTO
from pixart_jax.parallel import rules
from pixart_jax.training.dreambooth import CLASS
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.memory import Choice, choose_remat
from pixart_jax.training.optimizer import make_optimizer
from pixart_jax.training.state import TrainState, abstract_state
from pixart_jax.training.tasks import OverBase, Task, make_task

LATENT = 8  # pixels a side of a latent pixel


@dataclasses.dataclass(frozen=True)
class StageParts:
    """What a stage learns, its optimizer, and its state as shapes with shardings."""

    task: Task
    optimizer: optax.GradientTransformationExtraArgs
    abstract: TrainState
    remat: Choice | None = None  # the policy chosen, where the config says "auto"
    # parameters that are read and not trained (tasks.OverBase): shapes with shardings, or arrays
    base: Any = None

    def load_base(self, mesh: Mesh) -> StageParts:
        """With the arrays of the base, read from the folder that the stage names."""
        if not isinstance(self.task, OverBase):
            return self
        return dataclasses.replace(self, base=self.task.load_base(mesh))


def build_stage(config: Config, stage: StageConfig, frozen: Frozen, mesh: Mesh) -> StageParts:
    """Build the parts of a stage on a mesh.

    Raises UserError for a task that does not fit its config, and where the mesh leaves much of the
    model replicated on every device.
    """
    auto = config.remat == AUTO
    # the state does not depend on the policy
    task = make_task(dataclasses.replace(config, remat="none") if auto else config, stage, frozen)
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    base = None
    if isinstance(task, OverBase):
        rules.check_sharded(task.base_boxed(), mesh)
        base = task.base_shapes(mesh)
    else:
        rules.check_sharded(boxed, mesh)
    names = rules.logical_names(boxed)
    fake_rate = stage.tdm.fake_rate if stage.task == "tdm" else None
    optimizer = make_optimizer(stage.optimizer, stage.steps, stage.batch_size, names, fake_rate)
    state = abstract_state(boxed, optimizer, mesh)
    if not auto:
        return StageParts(task, optimizer, state, base=base)
    remat = choose_remat(config, stage, state, mesh, base)
    task = make_task(dataclasses.replace(config, remat=remat.name), stage, frozen)
    return StageParts(task, optimizer, state, remat, base)


def abstract_batch(
    config: Config, stage: StageConfig, bucket: tuple[int, int], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch of a bucket (height, width) in pixels as shapes, as the loader gives it
    (data.encoded, data.samples).

    Texts are taken to be padded to max_text_tokens, the longest that a stage admits.
    """
    b, (height, width), text = stage.batch_size, bucket, stage.data.max_text_tokens
    f32, i32 = jnp.float32, jnp.int32
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    if stage.task == "autoencoder":
        shapes = {"images": ((b, height, width, 3), f32)}
    elif stage.task == "text_to_text":
        ids, lengths = ((b, text), i32), ((b,), i32)
        shapes = {"input_ids": ids, "lengths": lengths, "is_target": ((b,), jnp.bool_)}
        shapes |= {"target_ids": ids, "target_lengths": lengths}
    else:
        latents = (b, height // LATENT, width // LATENT, config.model.in_channels)
        shapes = {"mean": (latents, f32), "std": (latents, f32), "label": ((b,), i32)}
        shapes |= {"size": ((b, 2), f32), "aspect_ratio": ((b,), f32)}
        if stage.data.condition is not None:
            shapes |= {"control_mean": (latents, f32), "control_std": (latents, f32)}
        if stage.reads_text:
            states = (b, text, config.model.caption_width)
            shapes |= {"text_states": (states, jnp.bfloat16), "text_lengths": ((b,), i32)}
        if stage.dreambooth is not None and stage.dreambooth.class_prompt is not None:
            shapes |= {f"{CLASS}{name}": value for name, value in shapes.items()}
    sharding = rules.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A step's random key as a shape."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rules.replicated(mesh))

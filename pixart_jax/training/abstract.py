"""A stage's step from shapes alone: what a run fills with arrays, and what the planner compiles for
hardware that is not here.

``parts`` and ``compiled_step`` are the one place where a stage's task, optimizer, state and step
are built, so a plan is of the very program that a run executes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pixart_jax.config import Config, StageConfig
from pixart_jax.models.remat import AUTO
from pixart_jax.parallel import rules
from pixart_jax.training.optimizer import make_optimizer, schedule
from pixart_jax.training.rematerialization import Choice, choose_remat
from pixart_jax.training.state import TrainState, abstract_state
from pixart_jax.training.step import CompiledStep
from pixart_jax.training.tasks import Task, make_task
from pixart_jax.weights.vae import config_from_json

LATENT = 8  # pixels a side of a latent pixel


@dataclasses.dataclass(frozen=True)
class StageParts:
    """What a stage learns, by which optimizer, and its state as shapes with shardings."""

    task: Task
    optimizer: object
    abstract: TrainState
    remat: Choice | None = None  # what was chosen, where the config leaves it to be chosen


def build_stage(config: Config, stage: StageConfig, frozen, mesh: Mesh) -> StageParts:
    """The parts of a stage on a mesh. frozen: training.frozen.Frozen, or AssumedFrozen where its
    folders are not at hand.

    Raises UserError for a task that does not fit its config, and where the mesh leaves much of the
    model whole on every device.
    """
    left = config.remat == AUTO
    # the state is the same whichever it is
    task = make_task(dataclasses.replace(config, remat="none") if left else config, stage, frozen)
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    rules.check_sharded(boxed, mesh)
    optimizer = make_optimizer(
        stage.optimizer, stage.steps, stage.batch_size, rules.logical_names(boxed)
    )
    state = abstract_state(boxed, optimizer, mesh)
    if not left:
        return StageParts(task, optimizer, state)
    remat = choose_remat(config, stage, state, mesh)
    return StageParts(
        make_task(dataclasses.replace(config, remat=remat.name), stage, frozen),
        optimizer,
        state,
        remat,
    )


def compiled_step(config: Config, stage: StageConfig, made: StageParts, mesh: Mesh) -> CompiledStep:
    """The step of a stage; nothing is compiled before its first call."""
    rate = schedule(stage.optimizer, stage.steps, stage.batch_size)
    spikes = config.guard.spike_factor
    return CompiledStep(
        made.task.losses,
        made.optimizer,
        rate,
        made.abstract,
        mesh,
        stage.optimizer.accumulate,
        spikes,
    )


def abstract_batch(
    config: Config, stage: StageConfig, bucket: tuple[int, int], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch of a bucket (height, width) in pixels, as the loader gives it: see
    data.encoded and data.samples.

    Texts are taken to be padded to max_text_tokens, the longest that a stage admits.
    """
    b, (height, width), text = stage.batch_size, bucket, stage.data.max_text_tokens
    wide, whole = jnp.float32, jnp.int32
    if stage.task == "autoencoder":
        shapes = {"images": ((b, height, width, 3), wide)}
    elif stage.task == "text_to_text":
        shapes = {
            "input_ids": ((b, text), whole),
            "lengths": ((b,), whole),
            "target_ids": ((b, text), whole),
            "target_lengths": ((b,), whole),
            "itself": ((b,), jnp.bool_),
        }
    else:
        latents = (b, height // LATENT, width // LATENT, config.model.in_channels)
        shapes = {
            "mean": (latents, wide),
            "std": (latents, wide),
            "label": ((b,), whole),
            "size": ((b, 2), wide),
            "aspect_ratio": ((b,), wide),
        }
        if stage.task == "text_to_image":
            shapes |= {
                "text_states": ((b, text, config.model.caption_width), jnp.bfloat16),
                "text_lengths": ((b,), whole),
            }
    sharding = rules.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def abstract_key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """A step's random key as a shape."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=rules.replicated(mesh))


class FrozenSpec:
    """Stands in for the frozen parts where a program is made from shapes alone: the few numbers
    that enter it.

    The VAE's scaling factor is read where its folder is here. ``assumptions``: what was taken for
    granted, in words.
    """

    def __init__(self, config: Config):
        self._config = config
        self.assumptions: list[str] = []

    @property
    def scaling_factor(self) -> float:
        folder = Path(self._config.vae or "")
        for path in (folder / "vae" / "config.json", folder / "config.json"):
            if self._config.vae and path.is_file():
                return config_from_json(json.loads(path.read_text())).scaling_factor
        return self._assume(
            0.18215,
            "the VAE's scaling factor is Stable Diffusion's, 0.18215 (its folder is not here)",
        )

    def text_states(self, texts, most: int) -> list[np.ndarray]:
        """States of "" alone are asked for: one token, the end mark."""
        self._assume(None, 'the text encoder gives "" one token')
        return [np.zeros((1, self._config.model.caption_width), np.float32) for _ in texts]

    @property
    def tokenizer(self):
        size = self._config.text_model.vocab_size
        self._assume(None, f"the tokenizer has the text model's {size} tokens")
        return _Tokenizer(size)

    def _assume(self, value, words: str):
        if words not in self.assumptions:
            self.assumptions.append(words)
        return value


class _Tokenizer(SimpleNamespace):
    """As many tokens as the model has rows, the first of them hides words."""

    def __init__(self, size: int):
        super().__init__(size=size, mask_token_id=0, unk_token_id=0)

    def __len__(self) -> int:
        return self.size

"""A stage's batches: from its data config to arrays on the mesh."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from pixart_jax.config import Config, StageConfig
from pixart_jax.data.encoded import EncodedSamples
from pixart_jax.data.loader import Loader
from pixart_jax.data.samples import ImageSamples, TokenSamples
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError
from pixart_jax.training.frozen import Frozen

Encode = Callable[..., Path]
"""(source, *, buckets, captions, max_text_tokens, frozen) → the folder of its encoded shards, made where absent.

Encoding stands above training in the house, so whoever starts a run hands it in (train.py: pixart_jax.labelling.stage).
"""


def open_loader(config: Config, index: int, frozen: Frozen, encode: Encode | None) -> Loader:
    """The loader of stage ``index``: this process's rows of each global batch, the same whenever and wherever it is asked."""
    stage = config.stages[index]
    return Loader(
        _samples(stage, frozen, encode),
        batch_size=stage.batch_size,
        seed=stage_seed(config, index),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=stage.data.workers,
    )


def stage_seed(config: Config, index: int) -> int:
    """Seed of a stage's order of samples: stages that read the same set do not see it in the same order."""
    return config.seed * 1_000_003 + index


def _samples(stage: StageConfig, frozen: Frozen, encode: Encode | None):
    data = stage.data
    if stage.task in ("class_conditional", "text_to_image"):
        captions = data.captions if stage.task == "text_to_image" else ()
        if not data.source.startswith("tfds:"):
            return EncodedSamples(data.source, captions, data.max_text_tokens)
        if encode is None:
            raise UserError(f"stage {stage.name}: {data.source} is not encoded, and this run was given nothing to encode it with")
        source = open_source(data.source, data.split, where=data.where, limit=data.limit)
        kinds = tuple(kind for kind, weight in captions if weight > 0)
        folder = encode(source, buckets=data.buckets, captions=kinds, max_text_tokens=data.max_text_tokens, frozen=frozen)
        return EncodedSamples(folder, captions, data.max_text_tokens)
    source = open_source(data.source, data.split, where=data.where, limit=data.limit)
    if stage.task == "autoencoder":
        return ImageSamples(source, data.buckets)
    return TokenSamples(source, frozen.tokenizer, data.captions, data.max_text_tokens, target=stage.text_to_text.target)


def put(batch: dict[str, np.ndarray], sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """This process's rows → the global batch on the mesh; names and other text stay behind."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items() if rows.dtype.kind != "U"}

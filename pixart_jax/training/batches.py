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
from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.parallel.rules import batch_sharding
from pixart_jax.training.frozen import Frozen

Encode = Callable[..., Path]
"""(source, *, buckets, captions, max_text_tokens, frozen) → the folder of its encoded shards, made where absent.

Encoding stands above training in the house, so whoever starts a run hands it in (train.py: pixart_jax.labelling.stage).
"""


def open_loader(config: Config, index: int, frozen: Frozen, encode: Encode | None, mesh: jax.sharding.Mesh | None = None) -> Loader:
    """The loader of stage ``index``: the rows of each global batch that this process's devices of ``mesh`` need (None: all of them).

    The global batch is the same whenever and wherever it is asked for.
    """
    stage = config.stages[index]
    return Loader(
        _samples(stage, frozen, encode),
        batch_size=stage.batch_size,
        seed=stage_seed(config, index),
        rows=None if mesh is None else rows_of(batch_sharding(mesh), stage.batch_size),
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


def rows_of(sharding: jax.sharding.NamedSharding, size: int) -> np.ndarray:
    """Numbers (ascending) of a global batch's rows that lie on this process's devices.

    Processes whose devices differ only along context or tensor have the same rows, and one's rows need not be neighbours.
    UserError where the batch does not cut into equal parts.
    """
    parts = _parts(sharding)
    if size % parts:
        raise UserError(f"batch size {size} does not cut into {parts} equal parts, one for each batch shard of the mesh")
    held = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def put(batch: dict[str, np.ndarray], sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """This process's rows → the global batch on the mesh; names and other text stay behind."""
    arrays = {name: rows for name, rows in batch.items() if rows.dtype.kind != "U"}
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)
    mine = len(next(iter(arrays.values())))
    distinct = len(set(map(str, sharding.addressable_devices_indices_map((_parts(sharding),)).values())))
    size = mine // distinct * _parts(sharding)
    numbers = rows_of(sharding, size)

    def part(rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[0].indices(size)
        at = np.searchsorted(numbers, first)
        return rows[at : at + stop - first]  # the rows of one device are neighbours, here as there

    return {
        name: jax.make_array_from_callback((size, *rows.shape[1:]), sharding, lambda index, rows=rows: part(rows, index))
        for name, rows in arrays.items()
    }


def _parts(sharding: jax.sharding.NamedSharding) -> int:
    """How many parts a batch is cut into."""
    return batch_shards(sharding.mesh)

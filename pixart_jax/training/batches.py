"""A stage's batches: from its data config to arrays on the mesh.

What a source is to a task:

    source                          class_conditional, text_to_image                     autoencoder
    text_to_text pictures (tfds, folder,         encoded once into the cache folder, by the run's
    decoded at each     captions read once
      webdataset, pixart)             own frozen parts; then as records                    step
    records: a folder of encode     read as they are; those of another VAE, text         refused
                                      captions read once encoder, tokenizer or size are refused
    pixart-features                 read as they are (no labels: text_to_image alone)    refused
    refused a mixture of these              each part as above, and drawn with its share
    (data/mixed.py)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from pixart_jax.config import Config, StageConfig
from pixart_jax.data import records
from pixart_jax.data.encoded import EncodedSamples
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.features import FeatureSamples
from pixart_jax.data.loader import Loader
from pixart_jax.data.mixed import MixedSamples
from pixart_jax.data.samples import ImageSamples, Samples, TokenSamples
from pixart_jax.data.sources import open_source, parse_mixture, parse_source
from pixart_jax.errors import UserError
from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.parallel.rules import batch_sharding
from pixart_jax.pipeline.encoder_identity import expected_identity
from pixart_jax.training.frozen import Frozen

Encode = Callable[..., Path]
"""(source, *, buckets, captions, max_text_tokens, frozen[, strict]) → the folder of its encoded
shards, made where absent.

Encoding stands above training in the house, so whoever starts a run hands it in (train.py:
pixart_jax.captioning.stage).
"""


def open_loader(
    config: Config,
    index: int,
    frozen: Frozen,
    encode: Encode | None,
    mesh: jax.sharding.Mesh | None = None,
) -> Loader:
    """The loader of stage ``index``: the rows of each global batch that this process's devices of
    ``mesh`` need (None: all of them).

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
    """Seed of a stage's order of samples: stages that read the same set do not see it in the same
    order."""
    return config.seed * 1_000_003 + index


_DIFFUSION = ("class_conditional", "text_to_image")


def _samples(stage: StageConfig, frozen: Frozen, encode: Encode | None) -> Samples:
    """What a stage reads. What was left out on the way is counted in a line, and named above it."""
    faults = BadRecords(stage.data.strict)
    parts = parse_mixture(stage.data.source)
    read = [
        _part(text, share if len(parts) > 1 else None, stage, frozen, encode, faults)
        for share, text in parts
    ]
    if jax.process_index() == 0:
        report(stage, faults)
    return (
        read[0]
        if len(parts) == 1
        else MixedSamples(read, [share for share, _ in parts], [text for _, text in parts])
    )


def report(stage: StageConfig, faults: BadRecords, named: int = 20) -> None:
    """Say what a stage goes without."""
    for fault in list(faults)[:named]:
        print(f"stage {stage.name}: {fault}")
    if summary := faults.summary():
        print(f"stage {stage.name}: {stage.data.source}: {summary}")


def _part(
    text: str,
    share: float | None,
    stage: StageConfig,
    frozen: Frozen,
    encode: Encode | None,
    faults: BadRecords,
) -> Samples:
    """One source of a stage, alone (share None) or in a mixture."""
    data, (kind, rest) = stage.data, parse_source(text)
    captions = data.captions if stage.task == "text_to_image" else ()
    if stage.task in _DIFFUSION and kind in ("records", "pixart-features"):
        for field in ("where", "limit"):
            if getattr(data, field) is not None:
                raise UserError(
                    f"stage {stage.name}: data.{field} chooses among pictures, and {text} is "
                    "encoded: choose when it is encoded"
                )
        return (
            _records(rest, stage, captions, frozen, faults)
            if kind == "records"
            else _features(rest, stage, captions, faults)
        )
    limit = (
        None
        if data.limit is None
        else data.limit
        if share is None
        else math.ceil(share * data.limit)
    )
    source = open_source(text, data.split, where=data.where, limit=limit, faults=faults)
    if stage.task in _DIFFUSION:
        if encode is None:
            raise UserError(
                f"stage {stage.name}: {text} is not encoded, and this run was given nothing to "
                "encode it with"
            )
        kinds = tuple(kind for kind, weight in captions if weight > 0)
        how = {
            "buckets": data.buckets,
            "captions": kinds,
            "max_text_tokens": data.max_text_tokens,
            "frozen": frozen,
        }
        folder = encode(source, **how, **({"strict": True} if data.strict else {}))
        return EncodedSamples(folder, captions, data.max_text_tokens, faults=faults)
    if stage.task == "autoencoder":
        if kind == "records":
            raise UserError(
                f"stage {stage.name}: an autoencoder learns from pictures, and {text} holds none; "
                "give the set it was encoded from"
            )
        return ImageSamples(source, data.buckets)
    return TokenSamples(
        source,
        frozen.tokenizer,
        data.captions,
        data.max_text_tokens,
        target=stage.text_to_text.target,
    )


def _records(
    folder: str, stage: StageConfig, captions, frozen: Frozen, faults: BadRecords
) -> EncodedSamples:
    """Encoded shards, refused where another model's parts than the run's made them, or for other
    sizes than the stage's."""
    manifest = records.Manifest.read(folder)
    parts = ("vae", "text_encoder", "tokenizer") if captions else ("vae",)
    folders = {
        part: frozen.folder(part)
        for part in parts
        if part in manifest.identity and frozen.is_configured(part)
    }
    expected = expected_identity(manifest.identity, manifest.made_from, folders)
    return EncodedSamples(
        folder, captions, stage.data.max_text_tokens, expected, stage.data.buckets, faults
    )


def _features(root: str, stage: StageConfig, captions, faults: BadRecords) -> FeatureSamples:
    """The official features; nothing says which encoders made them, so that is the config's
    word."""
    if stage.task != "text_to_image":
        raise UserError(
            f"stage {stage.name}: pixart-features:{root} has no labels; a class-conditional stage "
            "needs them"
        )
    root, _, latents = root.partition("?latents=")
    data = stage.data
    return FeatureSamples(
        root,
        captions,
        data.max_text_tokens,
        latents=latents or None,
        buckets=data.buckets,
        faults=faults,
    )


def rows_of(sharding: jax.sharding.NamedSharding, size: int) -> np.ndarray:
    """Numbers (ascending) of a global batch's rows that lie on this process's devices.

    Processes whose devices differ only along context or tensor have the same rows, and one's rows
    need not be neighbours. UserError where the batch does not cut into equal parts.
    """
    parts = _parts(sharding)
    if size % parts:
        raise UserError(
            f"batch size {size} does not cut into {parts} equal parts, one for each batch shard "
            "of the mesh"
        )
    held = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def put(batch: dict[str, np.ndarray], sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """This process's rows → the global batch on the mesh; names and other text stay behind."""
    arrays = {name: rows for name, rows in batch.items() if rows.dtype.kind != "U"}
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)
    mine = len(next(iter(arrays.values())))
    distinct = len(
        set(map(str, sharding.addressable_devices_indices_map((_parts(sharding),)).values()))
    )
    size = mine // distinct * _parts(sharding)
    numbers = rows_of(sharding, size)

    def part(rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[0].indices(size)
        at = np.searchsorted(numbers, first)
        return rows[at : at + stop - first]  # the rows of one device are neighbours, here as there

    return {
        name: jax.make_array_from_callback(
            (size, *rows.shape[1:]), sharding, lambda index, rows=rows: part(rows, index)
        )
        for name, rows in arrays.items()
    }


def _parts(sharding: jax.sharding.NamedSharding) -> int:
    """How many parts a batch is cut into."""
    return batch_shards(sharding.mesh)

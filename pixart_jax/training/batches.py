"""A stage's batches: from its data config to arrays on the mesh.

How a task reads a source:

    source                     class_conditional, text_to_image       autoencoder    text_to_text
    images (tfds, folder,      encoded once into the cache folder by  decoded at     captions read
      webdataset, pixart)      the run's frozen parts, then records   each step      once
    records (encoded shards)   as they are; those of another VAE,     refused        captions read
                               text encoder, tokenizer or size are                   once
                               refused
    pixart-features            as they are (text_to_image only)       refused        refused
    states (encode --prompts)  task tdm alone                         refused        refused
    a mixture of these         each part as above, drawn with its share (data/mixed.py)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pixart_jax.config import TEXT_TO_IMAGE, Config, StageConfig
from pixart_jax.data import records
from pixart_jax.data.buckets import key_of
from pixart_jax.data.encoded import EncodedSamples, collate
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.features import FeatureSamples
from pixart_jax.data.loader import Loader
from pixart_jax.data.mixed import MixedSamples
from pixart_jax.data.samples import ImageSamples, Samples, TokenSamples, encoded_length
from pixart_jax.data.sources import open_source, parse_mixture, parse_source
from pixart_jax.data.sources.sample import Source
from pixart_jax.errors import UserError
from pixart_jax.files import folder_fingerprint
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.parallel.rules import batch_sharding
from pixart_jax.pipeline import TextStates
from pixart_jax.pipeline.encoder_identity import expected_identity
from pixart_jax.training import dreambooth
from pixart_jax.training.frozen import Frozen

Encode = Callable[..., Path]
"""(source, *, buckets, captions, max_text_tokens, frozen[, strict]) → the folder of its encoded
shards, made where absent. Injected by commands/train.py, because training may not import encoding.
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
        _samples(config, stage, frozen, encode),
        batch_size=stage.batch_size,
        seed=config.seed * 1_000_003 + index,  # stages of one set see it in different orders
        rows=None if mesh is None else rows_of(batch_sharding(mesh), stage.batch_size),
        workers=stage.data.workers,
        window=stage.data.shuffle_shards,
    )


_DIFFUSION = ("class_conditional", "controlnet", *TEXT_TO_IMAGE)


def _samples(config: Config, stage: StageConfig, frozen: Frozen, encode: Encode | None) -> Samples:
    """What a stage reads. Skipped records are counted in a printed line; the first are named."""
    bad = BadRecords(stage.data.strict)
    shares, texts = zip(*parse_mixture(stage.data.source))
    alone = len(texts) == 1
    samples = [
        _part(text, 1.0 if alone else share, config, stage, frozen, encode, bad)
        for share, text in zip(shares, texts)
    ]
    if jax.process_index() == 0:
        for error in list(bad)[:20]:
            print(f"stage {stage.name}: {error}")
        if summary := bad.summary():
            print(f"stage {stage.name}: {stage.data.source}: {summary}")
    return samples[0] if alone else MixedSamples(samples, shares, texts)


def _part(
    text: str,
    share: float,
    config: Config,
    stage: StageConfig,
    frozen: Frozen,
    encode: Encode | None,
    bad: BadRecords,
) -> Samples:
    """One source of a stage; share: its part of a mixture, 1 alone."""

    def refused(why: str) -> UserError:
        return UserError(f"stage {stage.name}: {why}")

    data, (kind, rest) = stage.data, parse_source(text)
    tokens, captions = data.max_text_tokens, data.captions if stage.reads_text else ()
    if kind == "states":
        if stage.task != "tdm":
            other = f"and task {stage.task} needs pictures"
            raise refused(f"{text} holds texts alone: task tdm trains on them, {other}")
        return PromptSamples(rest, stage, config.model, frozen)
    if stage.task in _DIFFUSION and kind in ("records", "pixart-features"):
        if stage.dreambooth is not None:
            wanted = "dreambooth needs pictures, as folder:DIR"
            raise refused(f"{text} is encoded under its own captions: {wanted}")
        for field in ("where", "limit"):
            if getattr(data, field) is not None:
                how = f"{text} is encoded: choose when it is encoded"
                raise refused(f"data.{field} chooses among pictures, and {how}")
        if kind == "records":
            return _records(rest, stage, captions, frozen, bad)
        if not stage.reads_text:
            raise refused(f"{text} has no labels; a class-conditional stage needs them")
        # the official files do not name their encoders, so the config is trusted
        if data.condition not in (None, "hed"):
            raise refused(f"{text} has conditions of hed alone: encode its pictures")
        root, _, latents = rest.partition("?latents=")
        options: dict[str, Any] = {"latents": latents or None, "control": bool(data.condition)}
        return FeatureSamples(root, captions, tokens, buckets=data.buckets, faults=bad, **options)
    limit = None if data.limit is None else math.ceil(share * data.limit)
    source = open_source(text, data.split, where=data.where, limit=limit, faults=bad)
    if stage.task in _DIFFUSION:
        if encode is None:
            missing = "and this run was given nothing to encode it with"
            raise refused(f"{text} is not encoded, {missing}")
        options = {"buckets": data.buckets, "max_text_tokens": tokens, "frozen": frozen}
        if data.strict:
            options["strict"] = True
        if data.condition is not None:
            weights = {"condition_weights": data.condition_weights}
            options |= {"condition": data.condition, **weights}

        def encoded(source: Source, captions: dreambooth.Kinds) -> Samples:
            kinds = tuple(kind for kind, weight in captions if weight > 0)
            folder = encode(source, captions=kinds, **options)
            return EncodedSamples(folder, captions, tokens, faults=bad, condition=data.condition)

        if stage.dreambooth is None:
            return encoded(source, captions)
        if jax.process_index() == 0:
            print(dreambooth.describe_identifier(stage, frozen.tokenizer))
        return dreambooth.open_samples(config, stage, source, frozen, encoded)
    if stage.task == "autoencoder":
        if kind == "records":
            instead = "give the set it was encoded from"
            raise refused(f"an autoencoder learns from pictures, and {text} holds none; {instead}")
        return ImageSamples(source, data.buckets)
    return TokenSamples(source, frozen.tokenizer, data.captions, tokens, stage.text_to_text.target)


class PromptSamples(Samples):
    """The texts of a file of ``encode --prompts``, each at one of the stage's buckets, in turn.

    Batches are those of data.encoded without a condition; mean and std are zero, and give the
    latents' size. Raises UserError for a file without states or of another text encoder.
    """

    def __init__(self, file: str, stage: StageConfig, model: TransformerConfig, frozen: Frozen):
        states = TextStates.open(file)
        if frozen.is_configured("text_encoder"):
            parts = ("text_encoder", "tokenizer")
            states.check({part: folder_fingerprint(frozen.folder(part)) for part in parts})
        self._texts = [text for text in states if text]
        if not self._texts:
            raise UserError(f"stage {stage.name}: {file} holds no prompt but the empty one")
        self._states, self._channels = states, model.in_channels
        if (width := states[self._texts[0]].shape[-1]) != model.caption_width:
            raise UserError(
                f"stage {stage.name}: {file} holds states of width {width}, and the model reads "
                f"{model.caption_width}: encode the prompts with its text encoder"
            )
        longest = max(len(states[text]) for text in self._texts)
        self.length = encoded_length(file, longest, stage.data.max_text_tokens)
        self.buckets = stage.data.buckets
        self.bucket_of = (np.arange(len(self._texts)) % len(self.buckets)).astype(np.int16)
        seal = repr((self._texts, states.identity, self.buckets))
        self.fingerprint = hashlib.sha256(seal.encode()).hexdigest()

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        texts, size = [self._texts[index] for index in indices], self.buckets[bucket]
        zero = np.zeros((size[0] // 8, size[1] // 8, self._channels), np.float32)
        values = {"mean": zero, "std": zero, "label": -1, "size": size}
        values["aspect_ratio"] = key_of(size)
        rows = ((text, dict(values), self._states[text]) for text in texts)
        return collate(rows, len(texts), self.length)


def _records(
    folder: str, stage: StageConfig, captions, frozen: Frozen, bad: BadRecords
) -> EncodedSamples:
    """Encoded shards, refused where other models than the run's made them, or for other sizes than
    the stage's."""
    manifest = records.Manifest.read(folder)
    parts = ("vae", "text_encoder", "tokenizer") if captions else ("vae",)
    folders = {
        part: frozen.folder(part)
        for part in parts
        if part in manifest.identity and frozen.is_configured(part)
    }
    expected = expected_identity(manifest.identity, manifest.made_from, folders)
    data = stage.data
    checked = expected, data.buckets, bad, data.condition
    cache = data.cache_gb, data.shuffle_shards
    return EncodedSamples(folder, captions, data.max_text_tokens, *checked, *cache)


def rows_of(sharding: jax.sharding.NamedSharding, size: int) -> np.ndarray:
    """Numbers (ascending) of a global batch's rows that lie on this process's devices.

    Processes whose devices differ only along context or tensor have the same rows, and a process's
    rows need not be neighbours. UserError where the batch does not cut into equal parts.
    """
    parts = batch_shards(sharding.mesh)
    if size % parts:
        raise UserError(
            f"batch size {size} does not cut into {parts} equal parts, one for each batch shard "
            "of the mesh"
        )
    held = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def put(batch: dict[str, np.ndarray], sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """This process's rows → the global batch on the mesh; keys and other text stay behind."""
    arrays = {name: rows for name, rows in batch.items() if rows.dtype.kind != "U"}
    if sharding.is_fully_addressable:
        return jax.device_put(arrays, sharding)
    parts = batch_shards(sharding.mesh)
    ours = sharding.addressable_devices_indices_map((parts,)).values()
    size = len(next(iter(arrays.values()))) // len(set(map(str, ours))) * parts
    numbers = rows_of(sharding, size)

    def part(rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[0].indices(size)
        at = np.searchsorted(numbers, first)
        return rows[at : at + stop - first]  # the rows of one device are neighbours

    return {
        name: jax.make_array_from_callback(
            (size, *rows.shape[1:]), sharding, lambda index, rows=rows: part(rows, index)
        )
        for name, rows in arrays.items()
    }

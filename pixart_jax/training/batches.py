"""A stage's batches: from its data config to arrays on the mesh."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from pixart_jax import tokenizer as tokenizers
from pixart_jax.config import Config, StageConfig
from pixart_jax.data.loader import Loader
from pixart_jax.data.samples import ImageSamples, TokenSamples
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError




def open_loader(config: Config, index: int, workdir: Path) -> Loader:
    """The loader of stage ``index``: this process's rows of each global batch. Encodes what is not encoded yet."""
    stage = config.stages[index]
    return Loader(
        _samples(config, stage, workdir),
        batch_size=stage.batch_size,
        seed=stage_seed(config, index),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=stage.data.workers,
    )


def stage_seed(config: Config, index: int) -> int:
    """Seed of a stage's order of samples: stages that read the same set do not see it in the same order."""
    return config.seed * 1_000_003 + index


def _samples(config: Config, stage: StageConfig, workdir: Path):
    data = stage.data
    if stage.task in ("class_conditional", "text_to_image"):
        raise UserError("encoded data: not there yet")
    source = open_source(data.source, data.split, where=data.where, limit=data.limit)
    if stage.task == "autoencoder":
        return ImageSamples(source, data.buckets)
    return TokenSamples(source, open_tokenizer(config, stage, workdir), data.captions, data.max_text_tokens)


def open_tokenizer(config: Config, stage: StageConfig, workdir: Path):
    """The tokenizer beside config.text_encoder; where that is None, one of whole words made from the stage's captions and kept in the workdir."""
    if config.text_encoder is not None:
        folder = Path(config.text_encoder)
        return tokenizers.load(folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder)
    folder = workdir / "tokenizer"
    if not folder.is_dir():
        source = open_source(stage.data.source, stage.data.split, where=stage.data.where, limit=stage.data.limit)
        words = sorted({word for i in range(len(source)) for kind, _ in stage.data.captions for text in source[i].texts(kind) for word in tokenizers.clean(text).split()})
        tokenizers.from_words(words).save_pretrained(str(folder))
    return tokenizers.load(folder)


def put(batch: dict[str, np.ndarray], sharding: jax.sharding.NamedSharding) -> dict[str, jax.Array]:
    """This process's rows → the global batch on the mesh; names and other text stay behind."""
    return {
        name: jax.make_array_from_process_local_data(sharding, rows)
        for name, rows in batch.items()
        if isinstance(rows, np.ndarray) and rows.dtype.kind in "fiub" or rows.dtype.name == "bfloat16"
    }

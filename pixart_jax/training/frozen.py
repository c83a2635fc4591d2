"""The parts that a diffusion stage uses and never trains: VAE, text encoder and tokenizer, loaded
when first needed."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from pixart_jax.config import Config, StageConfig
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError
from pixart_jax.files import find
from pixart_jax.finite import check_tensor
from pixart_jax.models.configs import VAEConfig
from pixart_jax.parallel.liveness import run_on_first_process
from pixart_jax.remote_path import RemotePath, local, located
from pixart_jax.text import (
    clean_caption,
    load_tokenizer,
    notice_loss,
    save_tokenizer,
    tokenize,
    word_tokenizer,
)
from pixart_jax.weights.component import load_component
from pixart_jax.weights.hub import model_folder
from pixart_jax.weights.vae import config_from_json

_TEXTS = 64  # encoded at once


def start_folder(stage: StageConfig) -> Path:
    """The folder of the component that a stage starts from; of a hub id, after its download."""
    part = {"autoencoder": "vae", "text_to_text": "text_encoder"}.get(stage.task, "transformer")
    folder = model_folder(stage.start, (part,))
    return folder / part if (folder / part).is_dir() else folder


@dataclasses.dataclass(frozen=True)
class CopiedComponent:
    """A part that was not trained: ``save`` copies its files. All processes call it, the first one
    writes."""

    source: Path

    def save(self, folder: Path) -> None:
        if jax.process_index() == 0:
            shutil.copytree(self.source, folder)


class Frozen:
    """The frozen parts of a config. workdir: where a tokenizer that the run makes is stored.
    share: gives the other processes a folder of it that the first one made, where they do not see
    the workdir (Bucket.share)."""

    def __init__(
        self, config: Config, workdir: Path, share: Callable[[str], object] = lambda name: None
    ):
        self._config, self.workdir, self.share = config, workdir, share
        self._states: dict[str, np.ndarray] = {}

    def folder(self, part: str) -> Path:
        """The folder of 'vae', 'text_encoder' or 'tokenizer'.

        config.vae and config.text_encoder name a whole model's folder or the part's own.
        """
        field = "vae" if part == "vae" else "text_encoder"
        value = getattr(self._config, field)
        if value is None:
            raise UserError(
                f"config {self._config.name}: {field} is None, but this run needs one: give a "
                "model folder"
            )
        given = model_folder(value, (field,))
        if not given.is_dir():
            raise UserError(
                f"{field} {str(given)!r}: no such folder; give a model folder, or one with "
                "config.json and weights"
            )
        if (given / part).is_dir():
            return given / part
        # text_encoder named by its own folder, the tokenizer beside it
        place = located(value)
        beside = (place if isinstance(place, RemotePath) else given).parent / part
        return local(beside) if part == "tokenizer" and beside.is_dir() else given

    def copied(self, part: str) -> CopiedComponent:
        """A part as the exported model takes it."""
        return CopiedComponent(self.folder(part))

    def is_configured(self, part: str) -> bool:
        """Whether the config names where 'vae', 'text_encoder' or 'tokenizer' lies."""
        return getattr(self._config, "vae" if part == "vae" else "text_encoder") is not None

    @functools.cached_property
    def vae(self):
        """The VAE component."""
        return load_component(self.folder("vae"))

    @functools.cached_property
    def vae_config(self) -> VAEConfig:
        """How latents are scaled before the denoiser sees them, and their channels."""
        path = self.folder("vae") / "config.json"
        try:
            return config_from_json(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None

    @property
    def scaling(self) -> tuple[float, float]:
        """The VAE's scaling factor and shift factor."""
        return self.vae_config.scaling_factor, self.vae_config.shift_factor

    def text_encoder(self):
        """The text encoder component, loaded anew at each call: it may be far larger than what is
        trained, so no reference is kept."""
        return load_component(self.folder("text_encoder"))

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of config.text_encoder; where that is None, one of the captions' whole
        words, made once and stored in the workdir."""
        if self._config.text_encoder is not None:
            return load_tokenizer(self.folder("tokenizer"))
        folder = self.workdir / "tokenizer"
        if not (folder / "tokenizer_config.json").is_file():
            run_on_first_process(
                "tokenizer", lambda: save_tokenizer(word_tokenizer(self._words()), folder)
            )
            self.share("tokenizer")
        return load_tokenizer(folder)

    def _words(self) -> list[str]:
        words = {word for stage in self._config.stages for word in stage.text_to_text.spare_words}
        for data in {stage.data for stage in self._config.stages}:
            source = open_source(data.source, data.split, where=data.where, limit=data.limit)
            for index in range(len(source)):
                captions = source[index].captions
                for kind, _ in data.captions:
                    for text in captions.get(kind, ()):
                        # punctuation marks are tokens of their own
                        words.update(re.findall(r"[a-z]+", clean_caption(text)))
        return sorted(words)

    def text_states(self, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        """The text encoder's states of each text, fp32 [l, c] of its real tokens; computed once a
        text. limit: of tokens."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._states]
        if missing:
            notice_loss("prompt", missing, clean_caption)
            ids, lengths = tokenize(self.tokenizer, missing, limit)
            encoder, rows = self.text_encoder(), range(0, len(ids), _TEXTS)
            parts = (encoder.apply(ids[n : n + _TEXTS], lengths[n : n + _TEXTS]) for n in rows)
            states = [np.asarray(row, np.float32) for part in parts for row in jax.device_get(part)]
            self._states |= {
                text: check_tensor(f"the text encoder's state of {text[:60]!r}", row[:length])
                for text, row, length in zip(missing, states, lengths, strict=True)
            }
        return [self._states[text] for text in texts]


class FrozenSpec(Frozen):
    """Stands in for the frozen parts where a program is made from shapes alone: the few numbers
    that enter it.

    The VAE's config is read where its folder exists. ``assumptions``: what was assumed, in
    words.
    """

    def __init__(self, config: Config):
        super().__init__(config, Path())
        self.assumptions: list[str] = []

    @functools.cached_property
    def vae_config(self) -> VAEConfig:
        folder = find(self._config.vae or "")
        for path in (folder / "vae" / "config.json", folder / "config.json"):
            if self._config.vae and path.is_file():
                return config_from_json(json.loads(path.read_text()))
        self._assume(
            "the VAE's scaling factor is Stable Diffusion's, 0.18215 (its folder is not here)"
        )
        return VAEConfig(latent_channels=self._config.model.in_channels)

    def text_states(self, texts: Sequence[str], limit: int) -> list[np.ndarray]:
        """States of "" alone are asked for: one token, the end mark."""
        self._assume('the text encoder gives "" one token')
        return [np.zeros((1, self._config.model.caption_width), np.float32) for _ in texts]

    @functools.cached_property
    def tokenizer(self):
        """As many tokens as the text model has rows; the first masks words."""
        if self._config.text_model is None:
            raise UserError(f"config {self._config.name}: text_model is None")
        size = self._config.text_model.vocab_size
        self._assume(f"the tokenizer has the text model's {size} tokens")
        return _Tokenizer(size=size, mask_token_id=0, unk_token_id=0)

    def _assume(self, words: str) -> None:
        if words not in self.assumptions:
            self.assumptions.append(words)


class _Tokenizer(SimpleNamespace):
    def __len__(self) -> int:
        return self.size

"""The parts that a diffusion stage rests on and never trains: VAE, text encoder and tokenizer,
opened when first needed."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from pixart_jax.config import Config
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError
from pixart_jax.parallel.liveness import run_on_first_process
from pixart_jax.text import clean_caption, load_tokenizer, save_tokenizer, tokenize, word_tokenizer
from pixart_jax.weights.component import load_component
from pixart_jax.weights.vae import config_from_json


class Frozen:
    """The frozen parts of a config. workdir: where a tokenizer is kept that the run itself
    makes."""

    def __init__(self, config: Config, workdir: Path):
        self._config, self._workdir = config, workdir
        self._states: dict[str, np.ndarray] = {}

    def folder(self, part: str) -> Path:
        """The folder of 'vae', 'text_encoder' or 'tokenizer'.

        config.vae and config.text_encoder name a whole model's folder or the part's own.
        """
        field = "vae" if part == "vae" else "text_encoder"
        given = getattr(self._config, field)
        if given is None:
            raise UserError(
                f"config {self._config.name}: {field} is None, but this run needs one: give a "
                "model folder"
            )
        given = Path(given)
        if not given.is_dir():
            raise UserError(
                f"{field} {str(given)!r}: no such folder; give a model folder, or one with "
                "config.json and weights"
            )
        if (given / part).is_dir():
            return given / part
        # text_encoder named by its own folder, the tokenizer beside it
        if part == "tokenizer" and (given.parent / part).is_dir():
            return given.parent / part
        return given

    def is_configured(self, part: str) -> bool:
        """Whether the config names where 'vae', 'text_encoder' or 'tokenizer' lies."""
        return getattr(self._config, "vae" if part == "vae" else "text_encoder") is not None

    @functools.cached_property
    def vae(self):
        """The VAE component."""
        return self._load("vae")

    @functools.cached_property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before the denoiser sees them."""
        path = self.folder("vae") / "config.json"
        try:
            return config_from_json(json.loads(path.read_text())).scaling_factor
        except (OSError, ValueError) as fault:
            raise UserError(f"{path} cannot be read: {fault}") from None

    def text_encoder(self):
        """The text encoder component, opened anew: it may be far larger than what is trained, so
        nobody keeps it."""
        return self._load("text_encoder")

    def _load(self, part: str):
        return load_component(self.folder(part))

    @functools.cached_property
    def tokenizer(self):
        """The tokenizer of config.text_encoder; where that is None, one of the captions' whole
        words, made once and kept in the workdir."""
        if self._config.text_encoder is not None:
            return load_tokenizer(self.folder("tokenizer"))
        folder = self._workdir / "tokenizer"
        if not (folder / "tokenizer_config.json").is_file():
            run_on_first_process(
                "tokenizer", lambda: save_tokenizer(word_tokenizer(self._words()), folder)
            )
        return load_tokenizer(folder)

    def _words(self) -> list[str]:
        words: set[str] = set()
        for data in {stage.data for stage in self._config.stages}:
            source = open_source(data.source, data.split, where=data.where, limit=data.limit)
            for index in range(len(source)):
                said = source[index].captions
                for kind, _ in data.captions:
                    for text in said.get(kind, ()):
                        # marks are pieces of their own
                        words.update(re.findall(r"[a-z]+", clean_caption(text)))
        return sorted(words)

    def text_states(self, texts: Sequence[str], most: int) -> list[np.ndarray]:
        """The text encoder's states of each text, fp32 [l, c] of its real tokens; computed once a
        text."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._states]
        if missing:
            ids, lengths = tokenize(self.tokenizer, missing, most)
            states = np.asarray(jax.device_get(self.text_encoder().apply(ids, lengths)), np.float32)
            self._states |= {
                text: row[:length]
                for text, row, length in zip(missing, states, lengths, strict=True)
            }
        return [self._states[text] for text in texts]

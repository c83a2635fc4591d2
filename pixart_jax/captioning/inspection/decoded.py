"""Encoded shards to be looked at: each record's picture is what the VAE makes of its latents, which
is all that training sees of it."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np

from pixart_jax.data.sources import Sample
from pixart_jax.data.sources.encoded import RecordsSource
from pixart_jax.images import to_uint8


class Decoded:
    """A source over encoded records, with pictures. vae: a component with .decode, the one that
    encoded them."""

    def __init__(self, encoded: RecordsSource, vae):
        self._encoded, self._vae, self._one = encoded, vae, threading.Lock()
        self.name, self.fingerprint = encoded.name, encoded.fingerprint
        self.caption_kinds, self.num_classes, self.faults = (
            encoded.caption_kinds,
            encoded.num_classes,
            encoded.faults,
        )

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> Sample:
        sample = self._encoded[index]
        with self._one:  # so that each bucket compiles once
            pixels = np.asarray(self._vae.decode(self._encoded.latents(index)[None]))[0]
        return dataclasses.replace(sample, image=to_uint8(pixels))

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: of the pictures before they were encoded."""
        return self._encoded.sizes()

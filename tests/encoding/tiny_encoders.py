"""A source of coloured noise, a VAE and a text encoder of a few lines, for tests of what is done
with the real ones."""

from __future__ import annotations

import hashlib
import io
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from pixart_jax.data.sources import Sample
from pixart_jax.text import word_tokenizer

WORDS = "a red green blue circle square on white ground left of right".split()


class Noise:
    """n PNG pictures in four sizes with captions of 1 to 12 words; ``broken`` ones are cut
    short."""

    def __init__(self, n: int, broken: tuple[int, ...] = (), name: str = "noise"):
        self._n, self._broken = n, broken
        self.name, self.caption_kinds = name, ("short", "dense")
        self.fingerprint = hashlib.sha256(f"{name} {n} {broken}".encode()).hexdigest()

    def __len__(self):
        return self._n

    def shape(self, index: int) -> tuple[int, int]:
        return ((32, 32), (40, 36), (32, 64), (70, 30))[index % 4]

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng(index)
        png = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (*self.shape(index), 3), np.uint8)).save(png, "PNG")
        data = png.getvalue()
        short = " ".join(rng.choice(WORDS, 1 + index % 3))
        dense = tuple(
            " ".join(rng.choice(WORDS, 4 + (index + i) % 9)) for i in range(1 + index % 2)
        )
        return Sample(
            f"noise-{index:05d}",
            data[: len(data) // 2] if index in self._broken else data,
            {"short": (short,), "dense": dense},
            index % 5,
        )

    def sizes(self) -> np.ndarray:
        return np.array([self.shape(i) for i in range(self._n)], np.int32)


@jax.jit
def _encode(scale, images):
    b, h, w, _ = images.shape
    mean = images.reshape(b, h // 8, 8, w // 8, 8, 3).mean((2, 4))
    mean = jnp.concatenate([mean, mean.sum(-1, keepdims=True)], -1) * scale
    return mean, 0.1 + jnp.abs(mean)


def vae(scale: float = 1.0, delay: float = 0.0):
    """Block means as latents."""
    params = {"scale": np.float32(scale)}

    def encode(images):
        time.sleep(delay)
        return _encode(params["scale"], images)

    return SimpleNamespace(config={"name": "tiny vae"}, params=params, encode=encode)


@jax.jit
def _states(table, ids, lengths):
    real = jnp.arange(ids.shape[1])[None, :] < lengths[:, None]
    states = table[ids] * real[..., None]
    return states + states.sum(1, keepdims=True) / 8


def text_encoder(seed: int = 0):
    """Each token's vector, and the sum of all real ones, so that a wrong length shows."""
    table = np.random.default_rng(seed).normal(size=(200, 16)).astype(np.float32)
    return SimpleNamespace(
        config={"width": 16},
        params={"table": table},
        apply=lambda ids, lengths: _states(table, ids, lengths),
    )


def words():
    return word_tokenizer(WORDS)

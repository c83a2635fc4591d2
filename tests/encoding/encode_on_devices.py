"""A program for tests, started with four simulated devices: encode one set with the model in
argv[1] into folders below argv[2], each on
other devices: one name a mesh ("data=2"), "+" where the encoders were opened on one device and are
copied to the rest, "!" with encoders of a few lines in place of the model's."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np

from pixart_jax.config import MeshConfig
from pixart_jax.encoding import encode
from pixart_jax.encoding.options import EncodeOptions
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.text import load_tokenizer
from pixart_jax.weights.component import load_component
from tests.encoding import tiny_encoders as tiny
from tests.training import tiny_run

OPTIONS = EncodeOptions(
    ((32, 32), (32, 64)), ("short", "dense"), 24, batch_size=4, shard_size=16, flip=True
)


class Texts(tiny.Noise):
    """Captions of the tiny tokenizer's words, some longer than the shortest width."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        words = np.random.default_rng(index).choice(tiny_run.WORDS, 1 + index % 22)
        return dataclasses.replace(
            sample, captions={"short": ("a red circle",), "dense": (" ".join(words), "a square")}
        )


def encoders(model, mesh=None):
    return {
        "vae": load_component(model / "vae", mesh=mesh),
        "text_encoder": load_component(model / "text_encoder", mesh=mesh),
        "tokenizer": load_tokenizer(model / "tokenizer"),
    }


def simple_encoders(model):
    """Encoders whose every value is computed alike wherever in a batch it stands, which a library's
    convolutions do not promise."""
    return {
        "vae": tiny.vae(),
        "text_encoder": tiny.text_encoder(),
        "tokenizer": load_tokenizer(model / "tokenizer"),
    }


def made(parts, folder, mesh=None):
    return encode.encode_dataset(
        Texts(22), OPTIONS, **parts, folder=folder, mesh=mesh, progress=False
    )


if __name__ == "__main__":
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    for name in sys.argv[3:]:
        sizes = MeshConfig.parse(name.rstrip("+!"))
        mesh = make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp])
        parts = (
            simple_encoders(model)
            if name.endswith("!")
            else encoders(model, None if name.endswith("+") else mesh)
        )
        made(parts, out / name, mesh)

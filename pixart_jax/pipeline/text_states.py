"""Stored text states: the encoder's states of each text's real tokens, on the host or in a file.

A text encoded once can be sampled from any number of times without its encoder, which for T5-XXL is
seven eighths of a model. The key of a text is its cleaned form, what the tokenizer gets. The file
is safetensors: ``states`` [tokens, c], the texts one after the other, ``offsets`` int64 [n + 1]
into it, and ``texts``, a JSON list as bytes; the identity of the encoder is its metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.finite import check_tensor
from pixart_jax.remote_path import local
from pixart_jax.text import clean_caption, lower_caption
from pixart_jax.weights.files import LazyTensor, SafetensorsFile, write_safetensors

_IDENTITY = "pixart_jax.text_states"
_DIFFERENCES = {  # where the name of a part of the identity does not say enough
    "text_encoder": "another text encoder",
    "width": "a text encoder of another width",
    "text_tokens": "another limit of tokens",
    "cleaning": "another cleaning of prompts",
    "computed_in": "another precision",
    "stored_in": "another dtype",
}


def cleaning_id(clean: Callable[[str], str]) -> str:
    """The name of a cleaning function in an identity."""
    known: dict[Any, str] = {clean_caption: "deepfloyd", lower_caption: "lower case"}
    return known.get(clean, getattr(clean, "__qualname__", repr(clean)))


class TextStates(dict[str, np.ndarray]):
    """{cleaned text: states [l, c] of its real tokens}; replaces the text encoder in sampling.

    identity: ModelFolder.text_identity's, with cleaning and stored_in; compared by :meth:`check`;
    may be empty. source: their name in messages.
    """

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        identity: Mapping[str, str],
        source: str = "the text states",
    ):
        super().__init__(rows)
        self.identity, self.source = dict(identity), source

    @classmethod
    def open(cls, path: str | os.PathLike) -> TextStates:
        """The states in a file of :func:`write`, read lazily. Raises UserError for other files."""
        path, command = local(path), "`python -m pixart_jax encode --prompts"
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the file that {command}` wrote")
        if not path.is_file():
            raise UserError(f"no text states {path}: {command} FILE --out {path}` makes them")
        # a list of prompts is no safetensors
        tensors = SafetensorsFile(path) if path.suffix == ".safetensors" else None
        identity = tensors.metadata.get(_IDENTITY) if tensors else None
        if not tensors or not identity or set(tensors) != {"states", "offsets", "texts"}:
            raise UserError(f"{path} holds no text states: give a file that {command}` wrote")
        texts = json.loads(tensors["texts"].tobytes().decode("utf-8"))
        states, offsets = tensors["states"], tensors["offsets"].tolist()
        if len(offsets) != len(texts) + 1 or offsets[-1] != len(states):
            damage = "its texts, offsets and states do not fit"
            raise UserError(f"{path} is damaged: {damage}; encode the prompts again")
        pairs = zip(offsets, offsets[1:])  # views of the file's pages
        rows = {text: states[a:b] for text, (a, b) in zip(texts, pairs, strict=True)}
        return cls(rows, json.loads(identity), str(path))

    def check(self, wanted: Mapping[str, str]) -> None:
        """Raise UserError where the identity differs from ``wanted`` in what both name."""
        for name, value in wanted.items():
            found = self.identity.get(name, value)
            if found != value:
                other = _DIFFERENCES.get(name, f"another {name}")
                raise UserError(
                    f"{self.source} was made with {other} ({found}) than this model's ({value}): "
                    "encode again into another file"
                )

    def precision(self, dtype: str) -> str | None:
        """How these states differ from those that a model computing in ``dtype`` encodes; None
        where they are equal to the bit."""
        computed, stored = self.identity.get("computed_in"), self.identity.get("stored_in")
        exact = computed == dtype and stored in (dtype, "float32")
        return None if exact else f"{computed} kept as {stored}"

    def lengths(
        self, texts: Sequence[str], clean: Callable[[str], str] = clean_caption
    ) -> np.ndarray:
        """Tokens of each text, int32 [n]. Raises UserError for a missing text."""
        self.check({"cleaning": cleaning_id(clean)})
        missing = list(dict.fromkeys(text for text in texts if clean(text) not in self))
        if missing:
            count = f"{len(missing)} of the prompts are" if len(missing) > 1 else "a prompt is"
            first = "the first is " if len(missing) > 1 else ""
            raise UserError(
                f"{count} not in {self.source}: {first}{_shortened(missing[0])}; "
                "`python -m pixart_jax encode --prompts` with the same --out adds what is missing"
            )
        return np.array([len(self[clean(text)]) for text in texts], np.int32)

    def batch(
        self, texts: Sequence[str], length: int, clean: Callable[[str], str] = clean_caption
    ) -> tuple[np.ndarray, np.ndarray]:
        """(states [n, length, c] in their stored dtype, padded by zeros, lengths int32 [n])."""
        rows = [self[clean(text)] for text in texts]
        states = np.zeros((len(rows), length, rows[0].shape[-1]), rows[0].dtype)
        for into, row in zip(states, rows, strict=True):
            into[: len(row)] = row
        return states, np.array([len(row) for row in rows], np.int32)


def write(
    path: str | os.PathLike,
    texts: Iterable[str],
    rows: Mapping[str, np.ndarray],
    identity: Mapping[str, str],
) -> None:
    """Write the states of ``texts``, in their order, to one file, atomically, with one text in
    memory at a time.

    rows: states [l, c] of each, all of one dtype (fp32 or bf16) and width. Raises UserError, and
    writes nothing, for states that are not finite.
    """
    texts = list(texts)
    if not texts:
        raise UserError(f"no texts to write to {path}: give at least one")

    def finite_states(text: str) -> np.ndarray:
        return check_tensor(f"the text encoder's state of {_shortened(text)}", rows[text])

    dtype, width = rows[texts[0]].dtype, rows[texts[0]].shape[-1]
    offsets = np.cumsum([0, *(len(rows[text]) for text in texts)], dtype=np.int64)
    names = json.dumps(texts, ensure_ascii=False).encode("utf-8")
    tensors = {
        "states": LazyTensor((int(offsets[-1]), width), dtype, lambda: map(finite_states, texts)),
        "offsets": offsets,
        "texts": np.frombuffer(names, np.uint8),
    }
    write_safetensors(path, tensors, {_IDENTITY: json.dumps(dict(identity), sort_keys=True)})


def texts_to_encode(
    prompts: Sequence[str], negatives: Sequence[str], null: str, clean: Callable[[str], str]
) -> list[str]:
    """The distinct texts whose states sampling reads. negatives: of guided prompts. null: 'text',
    or 'embedding', whose "" needs no states."""
    read = [text for text in negatives if null == "text" or clean(text)]
    return list(dict.fromkeys([*prompts, *read]))


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:60]!r}…"

"""The text half of a model: tokenizer and text encoder, which can encode all that a job needs and
then make room.

Every batch has one of a few shapes, eight texts of 16, 32, 64 … tokens, and a text's shape depends
on the text alone. So its states are the same to the bit whichever texts are encoded beside it: now,
later, or in another process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.parallel.rules import on_mesh, row_sharding
from pixart_jax.pipeline import fingerprint
from pixart_jax.pipeline import folder as model_folder
from pixart_jax.pipeline.text_states import TextStates, cleaning_id, to_storage_dtype
from pixart_jax.text import clean_caption, tokenize

# texts; 64 tokens of each keep an accelerator's matrix units busy, and one prompt alone wastes
# little
BATCH = 8
_SHORTEST = 16  # tokens


@dataclasses.dataclass(frozen=True, eq=False)
class PromptEncoder:
    """text_encoder: a component. tokenizer: transformers'. tokens: the most that the model reads of
    a text. mesh: where the parameters lie, or None. identity: what is known of where they are from
    (:func:`identity`)."""

    text_encoder: object
    tokenizer: object
    tokens: int
    mesh: jax.sharding.Mesh | None = None
    identity: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        dtype=None,
        mesh: jax.sharding.Mesh | None = None,
        *,
        quantization: str | None = None,
        cache: str | os.PathLike | None = None,
    ) -> PromptEncoder:
        """The text half of a model folder; the other half is not opened. Arguments and UserError as
        ``Pipeline.from_pretrained``."""
        parts = model_folder.read(folder, dtype, mesh, ("text_encoder",), quantization, cache)
        transformer, _ = model_folder.configs(folder)
        return cls(
            parts["text_encoder"],
            parts["tokenizer"],
            transformer.text_tokens,
            mesh,
            identity(folder, dtype, quantization=quantization),
        )

    def free(self) -> None:
        """Delete the encoder's parameters from the devices; nothing can be encoded after it,
        whoever else holds them."""
        for leaf in jax.tree.leaves(nn.unbox(dict(self.text_encoder.params))):
            if isinstance(leaf, jax.Array) and not leaf.is_deleted():
                leaf.delete()

    def lengths(
        self, texts: Sequence[str], clean: Callable[[str], str] = clean_caption
    ) -> np.ndarray:
        """Tokens of each text, int32 [n]."""
        return tokenize(self.tokenizer, texts, self.tokens, clean=clean)[1]

    def batch(
        self,
        texts: Sequence[str],
        length: int | None = None,
        clean: Callable[[str], str] = clean_caption,
    ) -> tuple[jax.Array, jax.Array]:
        """Texts → (states [n, l, c] fp32, lengths int32 [n]) on the devices; l: ``length``, by
        default the next multiple of 8."""
        ids, lengths = tokenize(self.tokenizer, texts, self.tokens, length, clean)
        members, parts = [], []
        for rows, states in self._encoded(ids, lengths):
            members += rows + [-1] * (self._batch - len(rows))
            parts.append(states)
        place = np.argsort(np.where(np.array(members) < 0, len(texts), members), kind="stable")[
            : len(texts)
        ].astype(np.int32)
        with on_mesh(self.mesh):
            sharding = None if self.mesh is None else row_sharding(self.mesh, len(texts))
            return _gathered(parts, place, ids.shape[1], sharding), self._place(lengths)

    def states(
        self,
        texts: Sequence[str],
        dtype: str = "float32",
        clean: Callable[[str], str] = clean_caption,
        told: Callable[[int], object] = lambda count: None,
    ) -> TextStates:
        """The states of all texts, once each, on the host. dtype: 'float32' or 'bfloat16'.
        told(count): called as texts are done."""
        cleaned = list(dict.fromkeys(clean(text) for text in texts))
        rows: dict[str, np.ndarray] = {}
        if cleaned:
            ids, lengths = tokenize(self.tokenizer, cleaned, self.tokens, clean=str)
            pending = None
            for batch in self._encoded(ids, lengths):
                # while the device encodes this one
                rows |= _fetched(pending, cleaned, lengths, dtype, told)
                pending = batch
            rows |= _fetched(pending, cleaned, lengths, dtype, told)
        made = {**self.identity, "cleaning": cleaning_id(clean), "stored_in": dtype}
        return TextStates({text: rows[text] for text in cleaned}, made)

    @property
    def _batch(self) -> int:
        return (
            BATCH
            if self.mesh is None
            else math.ceil(BATCH / batch_shards(self.mesh)) * batch_shards(self.mesh)
        )

    def _encoded(
        self, ids: np.ndarray, lengths: np.ndarray
    ) -> Iterator[tuple[list[int], jax.Array]]:
        """(row numbers, states [batch, width, c] on the devices), texts of one width together, the
        last batch of a width filled up."""
        widths = [self._width(int(length)) for length in lengths]
        for width in sorted(set(widths)):
            rows = [n for n, own in enumerate(widths) if own == width]
            for start in range(0, len(rows), self._batch):
                part = rows[start : start + self._batch]
                padded = np.full((self._batch, width), self.tokenizer.pad_token_id or 0, np.int32)
                known = min(width, ids.shape[1])
                padded[: len(part), :known] = ids[part, :known]
                counts = np.ones(self._batch, np.int32)
                counts[: len(part)] = lengths[part]
                with on_mesh(self.mesh):
                    yield part, self.text_encoder.apply(self._place(padded), self._place(counts))

    def _width(self, length: int) -> int:
        return min(self.tokens, max(_SHORTEST, 1 << (length - 1).bit_length()))

    def _place(self, array: np.ndarray) -> jax.Array:
        return (
            jnp.asarray(array)
            if self.mesh is None
            else jax.device_put(array, row_sharding(self.mesh, len(array)))
        )


def identity(
    folder: str | os.PathLike,
    dtype=None,
    clean: Callable[[str], str] | None = None,
    quantization: str | None = None,
) -> dict[str, str]:
    """What a model folder's text states are made with, from its files; no weight is loaded. clean:
    how texts are cleaned, if known.

    Two folders of one identity give the same states of the same texts (computed_in: to that
    precision). A folder whose text encoder's weights were left out, to be drawn from by text states
    alone, says nothing of them.
    """
    folder = Path(folder)
    transformer, _ = model_folder.configs(folder)
    made = {
        "width": str(transformer.caption_width),
        "text_tokens": str(transformer.text_tokens),
        "tokenizer": fingerprint.folder_fingerprint(folder / "tokenizer"),
        "computed_in": jnp.dtype(dtype or jnp.float32).name
        + (f" from {quantization}" if quantization else ""),
    }
    if any((folder / "text_encoder").glob("*.safetensors")) or any(
        (folder / "text_encoder").glob("*.bin")
    ):
        made["text_encoder"] = fingerprint.folder_fingerprint(folder / "text_encoder")
    return made if clean is None else {**made, "cleaning": cleaning_id(clean)}


def _fetched(pending, texts, lengths, dtype: str, told) -> dict[str, np.ndarray]:
    if pending is None:
        return {}
    rows, states = pending[0], np.asarray(pending[1])
    told(len(rows))
    return {
        texts[row]: to_storage_dtype(state[: lengths[row]], dtype)
        for row, state in zip(rows, states)
    }


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gathered(parts, place, length: int, sharding):
    """Rows ``place`` of the parts [batch, width, c] laid one after the other, each padded or cut to
    the length."""
    fitted = [
        jnp.pad(part[:, :length], ((0, 0), (0, max(0, length - part.shape[1])), (0, 0)))
        for part in parts
    ]
    rows = jnp.concatenate(fitted)[place]
    return rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)

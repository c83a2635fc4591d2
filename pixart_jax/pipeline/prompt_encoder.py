"""The text half of a model: tokenizer and text encoder.

Every batch has one of a few shapes, eight texts of 16, 32, 64 … tokens, and a text's shape depends
on the text alone. So its states are equal to the bit whichever texts are encoded beside it: now,
later, or in another process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.parallel.rules import on_mesh, row_sharding
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.pipeline.text_states import TextStates, cleaning_id
from pixart_jax.text import clean_caption, tokenize

# texts: 64 tokens of each keep an accelerator busy, and one prompt alone wastes little
BATCH = 8
_SHORTEST = 16  # tokens


@dataclasses.dataclass(frozen=True, eq=False)
class PromptEncoder:
    """text_encoder: a component. tokenizer: of transformers. tokens: the model's limit for a text.
    mesh: of the parameters, or None. identity: ModelFolder.text_identity's."""

    text_encoder: Any
    tokenizer: Any
    tokens: int
    mesh: jax.sharding.Mesh | None = None
    identity: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike | ModelFolder,
        dtype=None,
        mesh: jax.sharding.Mesh | None = None,
        *,
        quantization: str | None = None,
        cache: str | os.PathLike | None = None,
    ) -> PromptEncoder:
        """The text half of a folder; arguments and errors as ``Pipeline.from_pretrained``."""
        model = folder if isinstance(folder, ModelFolder) else ModelFolder.open(folder)
        parts = model.load(dtype, mesh, ("text_encoder",), quantization, cache)
        return cls(
            parts["text_encoder"],
            model.tokenizer(),
            model.transformer.text_tokens,
            mesh,
            model.text_identity(dtype, quantization=quantization),
        )

    def free(self) -> None:
        """Delete the encoder's parameters from the devices, for all who hold them."""
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
        """Texts → (states [n, l, c] fp32, lengths int32 [n]) on devices; l: ``length`` or the next
        multiple of 8."""
        ids, lengths = tokenize(self.tokenizer, texts, self.tokens, length, clean)
        rows, parts = [], []
        for members, states in self._encoded(ids, lengths):
            rows += members + [len(texts)] * (self._batch - len(members))  # fillers last
            parts.append(states)
        place = np.argsort(rows, kind="stable")[: len(texts)].astype(np.int32)
        with on_mesh(self.mesh):
            sharding = None if self.mesh is None else row_sharding(self.mesh, len(texts))
            return _gathered(parts, place, ids.shape[1], sharding), self._place(lengths)

    def states(
        self,
        texts: Sequence[str],
        dtype: str = "float32",
        clean: Callable[[str], str] = clean_caption,
        on_progress: Callable[[int], object] = lambda count: None,
    ) -> TextStates:
        """The states of all distinct texts on the host. dtype: 'float32' or 'bfloat16'.
        on_progress(count) is called as texts are encoded."""
        cleaned = list(dict.fromkeys(clean(text) for text in texts))
        rows: dict[str, np.ndarray] = {}
        if cleaned:
            ids, lengths = tokenize(self.tokenizer, cleaned, self.tokens, clean=str)
            for numbers, states in one_ahead(self._encoded(ids, lengths)):
                for row, found in zip(numbers, np.asarray(states)):
                    rows[cleaned[row]] = found[: lengths[row]].astype(jnp.dtype(dtype))
                on_progress(len(numbers))
        identity = {**self.identity, "cleaning": cleaning_id(clean), "stored_in": dtype}
        return TextStates({text: rows[text] for text in cleaned}, identity)

    @property
    def _batch(self) -> int:
        shards = batch_shards(self.mesh)
        return math.ceil(BATCH / shards) * shards

    def _encoded(
        self, ids: np.ndarray, lengths: np.ndarray
    ) -> Iterator[tuple[list[int], jax.Array]]:
        """(row numbers, states [batch, width, c] on the devices): texts of one width together, the
        last batch of a width filled up."""
        pad = self.tokenizer.pad_token_id or 0
        for part, padded, counts in text_batches(ids, lengths, self.tokens, self._batch, pad):
            with on_mesh(self.mesh):
                yield part, self.text_encoder.apply(self._place(padded), self._place(counts))

    def _place(self, array: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, row_sharding(self.mesh, len(array)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _gathered(parts, place, length: int, sharding):
    """Rows ``place`` of the joined parts [batch, width, c], padded or cut to the length."""
    same = [
        jnp.pad(part[:, :length], ((0, 0), (0, max(0, length - part.shape[1])), (0, 0)))
        for part in parts
    ]
    rows = jnp.concatenate(same)[place]
    return rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)


def text_batches(
    ids: Sequence[np.ndarray] | np.ndarray, lengths: Sequence[int], limit: int, rows: int, pad: int
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Yield (numbers, ids int32 [rows, width], lengths int32 [rows]): texts of one width together,
    the last batch of a width filled up with texts of one token.

    ids: token ids of each text. limit: the model's, in tokens; a text's width is 16,
    32, 64 … or the limit. pad: the id to pad with.
    """
    widths = [min(limit, max(_SHORTEST, 1 << (int(n) - 1).bit_length())) for n in lengths]
    for width in sorted(set(widths)):
        members = [number for number, other in enumerate(widths) if other == width]
        for start in range(0, len(members), rows):
            part = members[start : start + rows]
            padded, counts = np.full((rows, width), pad, np.int32), np.ones(rows, np.int32)
            for row, number in enumerate(part):
                own = ids[number][: lengths[number]]
                padded[row, : len(own)] = own
                counts[row] = lengths[number]
            yield part, padded, counts


def one_ahead(items: Iterator) -> Iterator:
    """The items, each after the next one was asked for: the device computes it meanwhile."""
    pending = None
    for item in items:
        if pending is not None:
            yield pending
        pending = item
    if pending is not None:
        yield pending

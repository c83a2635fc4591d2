"""One shard's samples → its records, on every device of a mesh.

A device always computes batches of the same few shapes: so many pictures of a bucket, eight texts
of 16, 32, 64 … tokens, and the width that a text is padded to is its own. So what is computed of a
sample does not depend on what lies beside it, nor on how many devices there are, as far as the
device's library computes every row of a batch alike. A CPU's convolutions of few channels do not
where it has AVX2
alone: the last rows of a thread's share are summed in another order, so a posterior of another
place or thread may differ in its last digit. Where fsdp or tensor cut the parameters, all sums may
be taken in another order, and the last digits of the fp32 posterior and, rarely, of a bfloat16
state differ.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_dtypes
import numpy as np

from pixart_jax.data import images, records
from pixart_jax.data.samples import tokenize
from pixart_jax.data.sources import Source
from pixart_jax.errors import UserError
from pixart_jax.images import to_model
from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.parallel.rules import replicated, row_sharding
from pixart_jax.text import clean_caption
from pixart_jax.weights.component import Component

CLEANING = "deepfloyd"  # of captions; another would make other states of the same words
# characters; beyond it stands no caption, and cleaning it would take minutes
LONGEST_CAPTION = 100_000
# a device and batch: 64 tokens of each keep its matrix units busy, and a few texts alone waste
# little
_TEXTS = 8
_SHORTEST = 16  # tokens


@dataclasses.dataclass
class _Picture:
    """A sample, decoded: what is known of its record, its pixels (uint8 [h, w, 3]), and its texts
    by the names of their states."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]
    pixels: np.ndarray
    texts: dict[str, str]


@dataclasses.dataclass
class _Computing:
    """A batch that the devices are at: (mean, std) of the pictures, as they are and mirrored;
    (rows, states) of the texts."""

    pictures: list[_Picture]
    posteriors: dict[str, tuple[jax.Array, jax.Array]]
    texts: list[tuple[list[tuple[int, str, int]], jax.Array]]
    samples: int


class ShardEncoder:
    """vae, text_encoder, tokenizer: as ``encode.ensure`` takes them. batch_size: pictures of a
    device. mesh: of this process's own
    devices, None: the first of them. strict: a sample that cannot be encoded raises."""

    def __init__(
        self,
        source: Source,
        captions: Sequence[str],
        max_text_tokens: int,
        batch_size: int,
        vae,
        text_encoder=None,
        tokenizer=None,
        *,
        flip: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        strict: bool = False,
    ):
        self._source, self._captions, self._most = source, tuple(captions), max_text_tokens
        self._flip, self._mesh, self._strict = flip, mesh, strict
        shards = 1 if mesh is None else batch_shards(mesh)
        self._rows, self._text_rows = batch_size * shards, min(_TEXTS, batch_size) * shards
        self._vae, self._text_encoder = _on_all(vae, mesh), _on_all(text_encoder, mesh)
        self._tokenizer = tokenizer

    def records(
        self,
        indices: Sequence[int],
        bucket: tuple[int, int],
        left_out: Callable[[str, str], object],
        told: Callable[[int], object] = lambda count: None,
    ) -> Iterator[tuple[bytes, dict[str, int]]]:
        """(record, tokens of its longest text by those kinds that it has) of each sample that can
        be encoded, in their order.

        left_out(key, reason): called for every other. told(count): called when so many more samples
        are done.
        """
        batches = [
            indices[start : start + self._rows] for start in range(0, len(indices), self._rows)
        ]
        computing: _Computing | None = None
        with concurrent.futures.ThreadPoolExecutor(
            min(16, os.cpu_count() or 1), "decode"
        ) as readers:
            ahead = (
                [readers.submit(self._read, int(index), bucket) for index in batches[0]]
                if batches
                else []
            )
            for number in range(len(batches)):
                found = [picture.result() for picture in ahead]
                following = batches[number + 1] if number + 1 < len(batches) else ()
                # while the devices encode
                ahead = [readers.submit(self._read, int(index), bucket) for index in following]
                for picture in found:
                    if isinstance(picture, tuple):
                        left_out(*picture)
                begun = self._begin(
                    [picture for picture in found if isinstance(picture, _Picture)],
                    bucket,
                    len(found),
                )
                if computing is not None:  # packed and written while the devices encode the next
                    yield from self._packed(computing)
                    told(computing.samples)
                computing = begun
            if computing is not None:
                yield from self._packed(computing)
                told(computing.samples)

    def _read(self, index: int, bucket: tuple[int, int]) -> _Picture | tuple[str, str]:
        """A sample, decoded; or (its key, why it is left out)."""
        key = f"sample {index}"
        try:
            sample = self._source[index]
            key = sample.key
            return self._decoded(sample, bucket)
        except UserError as fault:
            reason = str(fault).removeprefix(f"{key}: ")
            kind = (
                "unreadable image"
                if isinstance(fault, images.UnreadableImage)
                else getattr(fault, "kind", "unreadable record")
            )
            if self._strict:
                raise UserError(f"{key}: {kind}: {reason}") from None
            return key, f"{kind}: {reason}"

    def _decoded(self, sample, bucket: tuple[int, int]) -> _Picture:
        metadata, texts = {"key": sample.key}, {}
        said = {
            kind: tuple(sample.captions[kind])
            for kind in self._captions
            if sample.captions.get(kind)
        }
        # one that lacks some kinds of several is shown with the others
        if self._captions and not said:
            raise _Unusable(
                "missing caption", f"there is none of kind {' or '.join(map(repr, self._captions))}"
            )
        for kind, found in said.items():
            if any(len(text) > LONGEST_CAPTION for text in found):
                raise _Unusable(
                    "caption too long", f"{max(map(len, found)):,} characters of kind {kind!r}"
                )
            metadata[f"captions.{kind}"] = json.dumps(found, ensure_ascii=False)
            texts |= {f"text.{kind}.{number}": text for number, text in enumerate(found)}
        image = sample.pixels()
        pixels, how = images.to_bucket(image, bucket)
        arrays = {
            "label": np.int64(sample.label),
            "size": np.array(image.shape[:2], np.int32),
            "fit": np.array(dataclasses.astuple(how), np.int32),
        }
        return _Picture(arrays, metadata, pixels, texts)

    def _begin(self, pictures: list[_Picture], bucket: tuple[int, int], samples: int) -> _Computing:
        """Give a batch to the devices, and do not wait for them."""
        if not pictures:
            return _Computing([], {}, [], samples)
        pixels = np.empty((self._rows, *bucket, 3), np.uint8)
        for row, picture in enumerate(pictures):
            pixels[row] = picture.pixels
        pixels[len(pictures) :] = pictures[-1].pixels  # one shape a bucket, so one executable
        posteriors = {"": self._vae.encode(self._placed(to_model(pixels)))}
        if self._flip:
            posteriors["_flip"] = self._vae.encode(self._placed(to_model(pixels[:, :, ::-1])))
        texts = [
            (row, name, text)
            for row, picture in enumerate(pictures)
            for name, text in picture.texts.items()
        ]
        for picture in pictures:
            picture.pixels = np.empty(0, np.uint8)
        return _Computing(pictures, posteriors, list(self._text_states(texts)), samples)

    def _text_states(
        self, texts: list[tuple[int, str, str]]
    ) -> Iterator[tuple[list[tuple[int, str, int]], jax.Array]]:
        """([(row, name, its tokens)], states [text rows, width, c] on the devices), texts of one
        width together."""
        ids = (
            tokenize(self._tokenizer, [clean_caption(text) for _, _, text in texts], self._most)
            if texts
            else []
        )
        widths = [
            min(self._most, max(_SHORTEST, 1 << max(len(row) - 1, 0).bit_length())) for row in ids
        ]
        for width in sorted(set(widths)):
            members = [number for number, own in enumerate(widths) if own == width]
            for start in range(0, len(members), self._text_rows):
                part = members[start : start + self._text_rows]
                padded = np.full(
                    (self._text_rows, width), self._tokenizer.pad_token_id or 0, np.int32
                )
                # filler is one token long, and so is "" where there is no end mark
                lengths = np.ones(self._text_rows, np.int32)
                for row, number in enumerate(part):
                    padded[row, : len(ids[number])] = ids[number]
                    lengths[row] = max(len(ids[number]), 1)
                states = self._text_encoder.apply(self._placed(padded), self._placed(lengths))
                yield (
                    [(*texts[number][:2], int(length)) for number, length in zip(part, lengths)],
                    states,
                )

    def _placed(self, array: np.ndarray):
        return (
            array
            if self._mesh is None
            else jax.device_put(array, row_sharding(self._mesh, len(array)))
        )

    def _packed(self, batch: _Computing) -> Iterator[tuple[bytes, dict[str, int]]]:
        longest: list[dict[str, int]] = [{} for _ in batch.pictures]
        for members, states in batch.texts:
            states = np.asarray(states).astype(ml_dtypes.bfloat16)
            for (row, name, length), state in zip(members, states):
                batch.pictures[row].arrays[name] = state[:length]
                kind = name.split(".", 1)[1].rsplit(".", 1)[0]
                longest[row][kind] = max(longest[row].get(kind, 0), length)
        for side, (mean, std) in batch.posteriors.items():
            mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
            for row, picture in enumerate(batch.pictures):
                picture.arrays |= {f"mean{side}": mean[row], f"std{side}": std[row]}
        for picture, tokens in zip(batch.pictures, longest):
            yield records.encode_record(picture.arrays, picture.metadata), tokens


class _Unusable(UserError):
    """A sample that cannot be encoded. kind: in the few words that are counted."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


def _on_all(encoder, mesh: jax.sharding.Mesh | None):
    """An encoder with its parameters on every device of the mesh: where it was opened on one, as a
    copy on each."""
    if mesh is None or not isinstance(encoder, Component) or encoder.mesh is not None:
        return encoder
    return encoder.replace(params=jax.device_put(encoder.params, replicated(mesh)), mesh=mesh)

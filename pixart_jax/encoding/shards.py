"""One shard's samples → its records, on every device of a mesh.

A device always computes batches of the same few shapes: ``batch_size`` images of a bucket, eight
texts of 16, 32, 64 … tokens, each text padded to the width of its own length. So a sample's values
do not depend on the samples beside it or on the number of devices, as far as the device's library
computes every row of a batch alike. CPUs with AVX2 alone do not for convolutions of few channels:
the last rows of a thread's share are summed in another order, and the last digit of a posterior may
differ. Where fsdp or tensor cut the parameters, all sums may be taken in another order, and the
last digits of the fp32 posterior and, rarely, of a bfloat16 state differ.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

from pixart_jax.data import images, records
from pixart_jax.data.samples import tokenize
from pixart_jax.data.sources import Sample, Source
from pixart_jax.encoding.options import Bucket, EncodeOptions
from pixart_jax.errors import UserError
from pixart_jax.finite import WHAT, whole
from pixart_jax.images import to_model
from pixart_jax.parallel.mesh import batch_shards
from pixart_jax.parallel.rules import replicated, row_sharding
from pixart_jax.pipeline.conditions import Condition, EdgeDetector, FolderCondition
from pixart_jax.pipeline.prompt_encoder import BATCH, one_ahead, text_batches
from pixart_jax.text import clean_caption, clean_captions
from pixart_jax.weights.base import Component

CLEANING = "deepfloyd"  # of captions; another would make other states of the same words
# characters; a longer text is not a caption, and cleaning it would take minutes
LONGEST_CAPTION = 100_000


@dataclasses.dataclass
class _Item:
    """A decoded sample: the arrays and metadata of its record, its pixels (uint8 [h, w, 3]), its
    cleaned texts by the names of their states, the captions that cleaning emptied or halved, and
    its condition from a folder (uint8 [h, w, 3])."""

    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]
    pixels: np.ndarray
    texts: dict[str, str]
    lost: list[str]
    control: np.ndarray | None = None


class _Batch(NamedTuple):
    """What the devices compute. posteriors: the names of its arrays, with {} for mean and std →
    (mean, std). texts: [(the item, name
    and tokens of each text, states [n, l, c])]. samples: how many, with those that are skipped."""

    items: list[_Item]
    posteriors: dict[str, tuple[jax.Array, jax.Array]]
    texts: list[tuple[list[tuple[_Item, str, int]], jax.Array]]
    samples: int


class ShardEncoder:
    """vae, text_encoder, tokenizer: as ``encode_dataset`` takes them. mesh: of this process's own
    devices, None for the first of them. condition: of what the records hold a posterior too."""

    def __init__(
        self,
        source: Source,
        options: EncodeOptions,
        vae,
        text_encoder=None,
        tokenizer=None,
        mesh: jax.sharding.Mesh | None = None,
        condition: Condition | None = None,
    ):
        self._source, self._options, self._mesh, self._tokenizer = source, options, mesh, tokenizer
        shards = batch_shards(mesh)
        self._rows = options.batch_size * shards
        self._text_rows = min(BATCH, options.batch_size) * shards
        self._condition = condition
        self._vae, self._text_encoder = _on_mesh(vae, mesh), _on_mesh(text_encoder, mesh)

    def records(
        self,
        indices: Sequence[int] | np.ndarray,
        bucket: Bucket,
        on_skip: Callable[[str, str], object],
        on_progress: Callable[[int], object] = lambda count: None,
        on_note: Callable[[str, str], object] = lambda key, note: None,
    ) -> Iterator[tuple[bytes, dict[str, int]]]:
        """Yield (record, tokens of the longest text of each kind that it has) of each sample that
        can be encoded, in order.

        on_skip(key, reason): called for every other. on_progress(count): called when so many more
        samples are done. on_note(key, note): of a caption that cleaning emptied or halved.
        Decoding, encoding and packing of successive batches overlap.
        """
        threads = max(min(16, os.cpu_count() or 1), getattr(self._source, "requests", 0))
        with concurrent.futures.ThreadPoolExecutor(threads) as readers:
            starts = range(0, len(indices), self._rows)
            batches = (indices[start : start + self._rows] for start in starts)
            decoding = (readers.map(lambda i: self._read(i, bucket), batch) for batch in batches)
            encoding = (self._encode(list(found), bucket, on_skip) for found in one_ahead(decoding))
            for batch in one_ahead(encoding):
                for item, longest in _pack(batch):
                    key = item.metadata["key"]
                    # fp32 states of 1e39 are infinite only as they are stored
                    bad = [name for name, array in item.arrays.items() if not whole(array)]
                    if bad:
                        reason = f"{WHAT}: {', '.join(bad)}"
                        if self._options.strict:
                            raise UserError(f"{key}: {reason}")
                        on_skip(key, reason)
                        continue
                    for note in item.lost:
                        on_note(key, note)
                    yield records.encode_record(item.arrays, item.metadata), longest
                on_progress(batch.samples)

    def _read(self, index: int, bucket: Bucket) -> _Item | tuple[str, str]:
        """Decode a sample; or return (its key, why it is skipped)."""
        key = f"sample {index}"
        try:
            sample = self._source[int(index)]
            key = sample.key
            return self._decode(sample, bucket)
        except UserError as error:
            kind, reason = "unreadable record", str(error).removeprefix(f"{key}: ")
            if isinstance(error, images.UnreadableImage):
                kind = "unreadable image"
            elif isinstance(error, _Unusable):
                kind, reason = error.args
            if self._options.strict:
                raise UserError(f"{key}: {kind}: {reason}") from None
            return key, f"{kind}: {reason}"

    def _decode(self, sample: Sample, bucket: Bucket) -> _Item:
        metadata: dict[str, str] = {"key": sample.key}
        texts: dict[str, str] = {}
        lost: list[str] = []
        kinds = [kind for kind in self._options.captions if sample.captions.get(kind)]
        if self._options.captions and not kinds:
            wanted = " or ".join(map(repr, self._options.captions))
            raise _Unusable("missing caption", f"there is none of kind {wanted}")
        for kind in kinds:
            found = tuple(sample.captions[kind])
            if (longest := max(map(len, found))) > LONGEST_CAPTION:
                raise _Unusable("caption too long", f"{longest:,} characters of kind {kind!r}")
            kept, some = clean_captions(found, clean_caption)
            lost += [f"caption {how}: {text[:40]!r}" for how, text in some]
            if not kept:
                continue
            captions = [text for text, _ in kept]
            metadata[f"captions.{kind}"] = json.dumps(captions, ensure_ascii=False)
            texts |= {f"text.{kind}.{number}": text for number, (_, text) in enumerate(kept)}
        if kinds and not texts:
            raise _Unusable("missing caption", lost[0].removeprefix("caption "))
        image = sample.pixels()
        pixels, crop = images.to_bucket(image, bucket)
        arrays = {
            "label": np.int64(sample.label),
            "size": np.array(image.shape[:2], np.int32),
            "fit": np.array(dataclasses.astuple(crop), np.int32),
        }
        control = None
        if isinstance(self._condition, FolderCondition):
            try:
                control = self._condition.read(sample.key, image.shape, bucket)
            except UserError as error:
                raise _Unusable("unusable condition", str(error)) from None
        return _Item(arrays, metadata, pixels, texts, lost, control)

    def _encode(
        self, found: list[_Item | tuple[str, str]], bucket: Bucket, on_skip: Callable
    ) -> _Batch:
        """Give a batch to the devices without waiting for them."""
        items = [item for item in found if isinstance(item, _Item)]
        for skipped in found:
            if isinstance(skipped, tuple):
                on_skip(*skipped)
        if not items:
            return _Batch([], {}, [], len(found))
        # the last row fills the batch: one shape and executable per bucket
        rows = [*items, *items[-1:] * (self._rows - len(items))]
        pixels = {"{}": np.stack([item.pixels for item in rows])}
        if isinstance(self._condition, EdgeDetector):
            edges = self._condition(self._place(pixels["{}"]))
            pixels["control_{}"] = np.repeat(edges[..., None], 3, axis=-1)
        elif self._condition is not None:
            pixels["control_{}"] = np.stack([item.control for item in rows])
        for item in items:
            item.pixels, item.control = np.empty(0, np.uint8), None
        if self._options.flip:
            pixels |= {f"{name}_flip": images[:, :, ::-1] for name, images in pixels.items()}
        posteriors = {
            name: self._vae.encode(self._place(to_model(images))) for name, images in pixels.items()
        }
        return _Batch(items, posteriors, list(self._encode_texts(items)), len(found))

    def _encode_texts(
        self, items: list[_Item]
    ) -> Iterator[tuple[list[tuple[_Item, str, int]], jax.Array]]:
        """Yield ([(item, name, tokens)], states [text rows, width, c] on the devices)."""
        texts = [(item, *named) for item in items for named in item.texts.items()]
        if not texts:
            return
        limit, pad = self._options.max_text_tokens, self._tokenizer.pad_token_id or 0
        ids = tokenize(self._tokenizer, [text for _, _, text in texts], limit)
        lengths = [max(len(row), 1) for row in ids]  # "" has no token where there is no end token
        for part, padded, counts in text_batches(ids, lengths, limit, self._text_rows, pad):
            states = self._text_encoder.apply(self._place(padded), self._place(counts))
            yield [(*texts[number][:2], lengths[number]) for number in part], states

    def _place(self, array: np.ndarray):
        if self._mesh is None:
            return array
        return jax.device_put(array, row_sharding(self._mesh, len(array)))


def _pack(batch: _Batch) -> Iterator[tuple[_Item, dict[str, int]]]:
    """Wait for a batch; yield its items with all arrays and tokens."""
    for members, states in batch.texts:
        stored = np.asarray(states).astype(ml_dtypes.bfloat16)
        for (item, name, length), state in zip(members, stored):
            item.arrays[name] = state[:length]
    for name, posterior in batch.posteriors.items():
        mean, std = (np.asarray(part, np.float32) for part in posterior)
        for row, item in enumerate(batch.items):
            item.arrays |= {name.format("mean"): mean[row], name.format("std"): std[row]}
    for item in batch.items:
        longest: dict[str, int] = {}
        for name in item.texts:
            kind = name.removeprefix("text.").rpartition(".")[0]
            longest[kind] = max(longest.get(kind, 0), len(item.arrays[name]))
        yield item, longest


class _Unusable(UserError):
    """(kind, detail): why a sample cannot be encoded; kind is counted."""


def _on_mesh(encoder, mesh: jax.sharding.Mesh | None):
    """An encoder opened on one device, with a copy of its parameters on each of the mesh."""
    if mesh is None or not isinstance(encoder, Component) or encoder.mesh is not None:
        return encoder
    return encoder.replace(params=jax.device_put(encoder.params, replicated(mesh)), mesh=mesh)

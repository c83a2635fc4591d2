"""Encoded records as training samples: posterior of the latents, text states and conditions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from pixart_jax.data import records
from pixart_jax.data.buckets import key_of
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.samples import CaptionMix, Samples, check_buckets, encoded_length, second_draw
from pixart_jax.data.shard_cache import CACHE_GB
from pixart_jax.errors import UserError


class EncodedSamples(Samples):
    """A folder of encoded shards.

    captions: kinds with their weights in the mix; empty for no text. expected: entries that the
    records' identity must have (pipeline.encoder_identity). buckets: the (height, width) of the
    stage; records of others are refused. faults: names the records without a text of the mix.
    condition: the kind that the records must have, 'hed', 'canny' or 'folder:DIR'. cache_gb and
    window: of shards in a bucket (data.shard_cache). Batches hold

      mean, std     float32 [b, height/f, width/f, c] of the VAE's posterior, unscaled
      control_mean, control_std     the same of the condition, where ``condition`` asks for it
      text_states   bfloat16 [b, l, c], text_lengths int32 [b] (with captions); l is the stage's
      label         int32 [b], −1 for none
      size          float32 [b, 2], (height, width) in px of the original image
      aspect_ratio  float32 [b], the bucket's key
      key           str [b]
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        captions: Sequence[tuple[str, float]],
        max_text_tokens: int,
        expected: Mapping[str, str] | None = None,
        buckets: Sequence[tuple[int, int]] | None = None,
        faults: BadRecords | None = None,
        condition: str | None = None,
        cache_gb: float = CACHE_GB,
        window: int = 0,
    ):
        self._records = records.Records(folder, expected, cache_gb)
        manifest = self._records.manifest
        self.shard_starts = self._records.starts[:-1]
        if (cache := self._records.cache) is not None:
            cache.check_holds(window)
            self.fetch = lambda indices: cache.fetch(self._records.shards_of(indices))
        self.identity = manifest.identity
        contents = repr([(shard.file, shard.sha256) for shard in manifest.shards])
        self.fingerprint = hashlib.sha256(contents.encode()).hexdigest()
        self.buckets = tuple(manifest.by_bucket)
        check_buckets(str(folder), self.buckets, buckets)
        numbers = [self.buckets.index(shard.bucket) for shard in manifest.shards]
        counts = [shard.count for shard in manifest.shards]
        self.bucket_of = np.repeat(np.array(numbers, np.int16), counts)
        self._ratios = [key_of(bucket) for bucket in self.buckets]
        self._flipped = manifest.identity.get("flip") == "yes"
        self._posteriors = ["{}"]
        if condition is not None:
            _check_condition(folder, manifest.identity.get("condition"), condition)
            self._posteriors.append("control_{}")
        self._mix = None
        if captions:
            longest = manifest.longest
            self._mix = CaptionMix(captions, tuple(longest), str(folder))
            self._leave_out_mute(self._mix, BadRecords() if faults is None else faults)
            needed = max(longest[kind] for kind in self._mix.kinds)
            self.length = encoded_length(str(folder), needed, max_text_tokens)

    def _leave_out_mute(self, mix: CaptionMix, faults: BadRecords) -> None:
        """Leave out the records without any text of the mix."""
        start = 0
        for shard in self._records.manifest.shards:
            lacking = (set(shard.lacking.get(kind, ())) for kind in mix.kinds)
            for place in sorted(set.intersection(*lacking)):
                self.bucket_of[start + place] = -1
                detail = f"none of the mix: {', '.join(mix.kinds)}"
                faults.add(f"{shard.file}, record {place}", "missing caption", detail)
            start += shard.count

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket, each with the caption, and mirrored or not, as its draw chooses."""

        def rows() -> Iterator[tuple[str, dict[str, Any], np.ndarray | None]]:
            for index, draw in zip(indices, draws):
                arrays, metadata = self._records[int(index)]
                side = "_flip" if self._flipped and is_flipped(draw) else ""
                names = [n.format(part) for n in self._posteriors for part in ("mean", "std")]
                values = {name: arrays[f"{name}{side}"] for name in names}
                values |= {"label": arrays["label"], "size": arrays["size"]}
                values["aspect_ratio"] = self._ratios[bucket]
                text = arrays[_chosen_text(self._mix, metadata, draw)] if self._mix else None
                yield metadata["key"], values, text

        return collate(rows(), len(indices), self.length)


def _check_condition(folder: str | os.PathLike, found: str | None, wanted: str) -> None:
    """Raise UserError unless records of entry ``found`` have conditions of this kind."""
    kind = found and found.partition(":")[0]
    if kind != wanted.partition(":")[0]:
        have = f"{kind} conditions" if kind else "no conditions"
        raise UserError(f"{folder} holds {have}: encode it with --condition {wanted}")


_INTEGERS = ("label", "text_lengths")


def collate(
    rows: Iterable[tuple[str, dict[str, Any], np.ndarray | None]], count: int, length: int
) -> dict[str, np.ndarray]:
    """A batch from ``count`` rows (key, values, text states [l, c], padded to ``length``)."""
    batch: dict[str, np.ndarray] = {}
    keys = []
    for row, (key, values, states) in enumerate(rows):
        if states is not None:
            values["text_lengths"] = len(states)
        if row == 0:
            for name, value in values.items():
                dtype = np.int32 if name in _INTEGERS else np.float32
                batch[name] = np.empty((count, *np.shape(value)), dtype)
            if states is not None:
                shape = (count, length, states.shape[-1])
                batch["text_states"] = np.zeros(shape, ml_dtypes.bfloat16)
        for name, value in values.items():
            batch[name][row] = value
        if states is not None:
            # plain integers are copied without the interpreter's lock
            out = batch["text_states"].view(np.uint16)[row]
            out[: len(states)] = states.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16)
        keys.append(key)
    return batch | {"key": np.array(keys)}


def _chosen_text(mix: CaptionMix, metadata: Mapping[str, str], draw: float) -> str:
    """The name of the array with the text states that a draw chooses."""
    present = {kind for kind in mix.kinds if f"captions.{kind}" in metadata}
    if not present:
        raise UserError(f"{metadata['key']}: no text states of kind {' or '.join(mix.kinds)}")
    kind, rest = mix.choose(draw, present)
    return f"text.{kind}.{int(rest * len(json.loads(metadata[f'captions.{kind}'])))}"


def is_flipped(draw: float) -> bool:
    """Whether a row of this draw takes the mirrored image; independent of the caption chosen."""
    return second_draw(draw) < 0.5

"""Encoded records as training samples: latents' posterior, text states and conditions, in batches of one bucket."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from pixart_jax.data import records
from pixart_jax.data.buckets import key_of
from pixart_jax.data.samples import CaptionMix, fixed_length
from pixart_jax.errors import UserError


class EncodedSamples:
    """A folder of encoded shards.

    captions: kinds and their weights in the mix; empty for no text. expected: entries of the identity that the records must have been
    made with (pipeline.encoder_identity). buckets: those that the stage takes, (height, width); records of any other are refused.
    Batches hold
      mean, std       float32 [b, height/f, width/f, c]   of the VAE's posterior, unscaled
      text_states     bfloat16 [b, l, c], text_lengths int32 [b]   (with captions); l is the same in the whole stage
      label           int32 [b], −1 where there is none
      size            float32 [b, 2]  (height, width) in px of the original picture
      aspect_ratio    float32 [b]     the bucket's key
      key             str [b]
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        captions: Sequence[tuple[str, float]],
        max_text_tokens: int,
        expected: Mapping[str, str] | None = None,
        buckets: Sequence[tuple[int, int]] | None = None,
    ):
        self._records = records.Records(folder, expected)
        shards = self._records.manifest.shards
        self.buckets = tuple(dict.fromkeys(shard.bucket for shard in shards))
        if buckets is not None and (others := [bucket for bucket in self.buckets if bucket not in {tuple(b) for b in buckets}]):
            raise UserError(
                f"{folder} was encoded at {_sizes(others)}, which the stage's buckets ({_sizes(buckets)}) do not hold: "
                "name the buckets that it was encoded with, or encode again"
            )
        self._ratios = [key_of(bucket) for bucket in self.buckets]
        self.bucket_of = np.concatenate(
            [np.full(s.count, self.buckets.index(s.bucket), np.int16) for s in shards] or [np.zeros(0, np.int16)]
        )
        self.identity = self._records.manifest.identity
        longest = self._records.manifest.longest
        self._mix = CaptionMix(captions, tuple(longest), str(folder)) if captions else None
        self.length = 0
        if self._mix:
            needed = max(longest[kind] for kind in self._mix.kinds)
            if needed > max_text_tokens:
                # The states of a text that was encoded whole are not those of its beginning: cutting here would be wrong.
                raise UserError(
                    f"{folder} holds texts of {needed} tokens, more than max_text_tokens = {max_text_tokens}: encode again with that cap"
                )
            self.length = fixed_length(needed, max_text_tokens)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket, each with the caption that its draw chooses."""
        means, stds, labels, sizes, keys = [], [], [], [], []
        states, lengths = None, np.zeros(len(indices), np.int32)
        for row, (index, draw) in enumerate(zip(indices, draws)):
            arrays, metadata = records.unpack(self._records.bytes(int(index)))
            means.append(arrays["mean"])
            stds.append(arrays["std"])
            labels.append(arrays["label"])
            sizes.append(arrays["size"])
            keys.append(metadata["key"])
            if self._mix:
                kind, rest = self._mix.choose(draw)
                count = metadata.get(f"captions.{kind}")
                if count is None:
                    raise UserError(f"{metadata['key']}: no text states of kind {kind!r}")
                found = arrays[f"text.{kind}.{int(rest * len(json.loads(count)))}"]
                if states is None:
                    states = np.zeros((len(indices), self.length, found.shape[-1]), ml_dtypes.bfloat16)
                states[row, : len(found)] = found
                lengths[row] = len(found)
        batch = {
            "mean": np.stack(means),
            "std": np.stack(stds),
            "label": np.array(labels, np.int32),
            "size": np.array(sizes, np.float32),
            "aspect_ratio": np.full(len(indices), self._ratios[bucket], np.float32),
            "key": np.array(keys),
        }
        return batch | ({"text_states": states, "text_lengths": lengths} if self._mix else {})


def _sizes(buckets: Sequence[tuple[int, int]], most: int = 4) -> str:
    shown = ", ".join(f"{height}×{width}" for height, width in buckets[:most])
    return shown + (f" and {len(buckets) - most} more" if len(buckets) > most else "")

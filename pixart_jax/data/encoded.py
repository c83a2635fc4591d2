"""Encoded records as training samples: posterior of the latents, text states and conditions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence

import ml_dtypes
import numpy as np

from pixart_jax.data import records
from pixart_jax.data.buckets import key_of
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.samples import CaptionMix, pad_length, second_draw, show_sizes
from pixart_jax.errors import UserError


class EncodedSamples:
    """A folder of encoded shards.

    captions: kinds with their weights in the mix; empty for no text. expected: entries that the
    records' identity must have (pipeline.encoder_identity). buckets: the (height, width) of the
    stage; records of others are refused. faults: names the records without a text of any kind of
    the mix, which are left out. Batches hold
      mean, std     float32 [b, height/f, width/f, c] of the VAE's posterior, unscaled
      text_states   bfloat16 [b, l, c], text_lengths int32 [b] (with captions); l is the same in the
                    whole stage
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
    ):
        self._records = records.Records(folder, expected)
        manifest = self._records.manifest
        self.identity: Mapping[str, str] | None = manifest.identity
        self.buckets = tuple(manifest.by_bucket)
        if others := unknown_buckets(self.buckets, buckets):
            raise UserError(
                f"{folder} was encoded at {show_sizes(others)}, which the stage's buckets "
                f"({show_sizes(buckets or ())}) do not hold: name the buckets that it was encoded "
                "with, or encode again"
            )
        numbers = [self.buckets.index(shard.bucket) for shard in manifest.shards]
        counts = [shard.count for shard in manifest.shards]
        self.bucket_of = np.repeat(np.array(numbers, np.int16), counts)
        self._ratios = [key_of(bucket) for bucket in self.buckets]
        self._flipped = manifest.identity.get("flip") == "yes"
        self._mix, self.length = None, 0
        if captions:
            longest = manifest.longest
            self._mix = CaptionMix(captions, tuple(longest), str(folder))
            self._leave_out_mute(self._mix, BadRecords() if faults is None else faults)
            needed = max(longest[kind] for kind in self._mix.kinds)
            if needed > max_text_tokens:
                # The states of a whole text, cut, are not the states of the cut text.
                raise UserError(
                    f"{folder} holds texts of {needed} tokens, more than max_text_tokens = "
                    f"{max_text_tokens}: encode again with that cap"
                )
            self.length = pad_length(needed, max_text_tokens)

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

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket, each with the caption, and mirrored or not, as its draw chooses.

        Every number is copied once, from the record's bytes to its place in the batch.
        """
        count, keys = len(indices), []
        batch: dict[str, np.ndarray] = {
            "label": np.empty(count, np.int32),
            "size": np.empty((count, 2), np.float32),
            "aspect_ratio": np.full(count, self._ratios[bucket], np.float32),
        }
        for row, (index, draw) in enumerate(zip(indices, draws)):
            arrays, metadata = self._records[int(index)]
            keys.append(metadata["key"])
            side = "_flip" if self._flipped and is_flipped(draw) else ""
            values = {"mean": arrays[f"mean{side}"], "std": arrays[f"std{side}"]}
            values |= {"label": arrays["label"], "size": arrays["size"]}
            if row == 0:
                for name in ("mean", "std"):
                    batch[name] = np.empty((count, *values[name].shape), np.float32)
            for name, value in values.items():
                batch[name][row] = value
            if self._mix:
                states = arrays[_chosen_text(self._mix, metadata, draw)].view(np.uint16)
                if row == 0:
                    shape = (count, self.length, states.shape[-1])
                    batch["text_states"] = np.empty(shape, ml_dtypes.bfloat16)
                    batch["text_lengths"] = np.empty(count, np.int32)
                # plain integers are copied without the interpreter's lock
                out = batch["text_states"].view(np.uint16)[row]
                out[: len(states)], out[len(states) :] = states, 0
                batch["text_lengths"][row] = len(states)
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


def unknown_buckets(
    found: Iterable[tuple[int, int]], wanted: Iterable[tuple[int, int]] | None
) -> list[tuple[int, int]]:
    """The buckets that a stage does not have; none if it takes all (None)."""
    known = None if wanted is None else {(height, width) for height, width in wanted}
    return [] if known is None else [bucket for bucket in found if bucket not in known]

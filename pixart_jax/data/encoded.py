"""Encoded records as training samples: latents' posterior, text states and conditions, in batches
of one bucket."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from pixart_jax.data import records
from pixart_jax.data.buckets import key_of
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.reused_memory import BufferPool
from pixart_jax.data.samples import CaptionMix, pad_length
from pixart_jax.errors import UserError


class EncodedSamples:
    """A folder of encoded shards.

    captions: kinds and their weights in the mix; empty for no text. expected: entries of the
    identity that the records must have been made with (pipeline.encoder_identity). buckets: those
    that the stage takes, (height, width); records of any other are refused.
    faults: names the records that have no text of any kind of the mix, which are left out; one that
    lacks a kind takes its others. Batches hold mean, std       float32 [b, height/f, width/f, c]
    of the VAE's posterior, unscaled text_states     bfloat16 [b, l, c], text_lengths int32 [b]
    (with captions); l is the same in the whole stage label           int32 [b], −1 where there is
    none size            float32 [b, 2]  (height, width) in px of the original picture aspect_ratio
    float32 [b]     the bucket's key key             str [b]
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
        shards = self._records.manifest.shards
        self.buckets = tuple(dict.fromkeys(shard.bucket for shard in shards))
        if buckets is not None and (
            others := [
                bucket for bucket in self.buckets if bucket not in {tuple(b) for b in buckets}
            ]
        ):
            raise UserError(
                f"{folder} was encoded at {_sizes(others)}, which the stage's buckets "
                f"({_sizes(buckets)}) do not hold: "
                "name the buckets that it was encoded with, or encode again"
            )
        self._ratios = [key_of(bucket) for bucket in self.buckets]
        self.bucket_of = np.concatenate(
            [np.full(s.count, self.buckets.index(s.bucket), np.int16) for s in shards]
            or [np.zeros(0, np.int16)]
        )
        self.identity = self._records.manifest.identity
        longest = self._records.manifest.longest
        self._mix = CaptionMix(captions, tuple(longest), str(folder)) if captions else None
        self.flipped = self.identity.get("flip") == "yes"
        self._memory = BufferPool()
        if self._mix:
            self._leave_out_mute(shards, BadRecords() if faults is None else faults)
        self.length = 0
        if self._mix:
            needed = max(longest[kind] for kind in self._mix.kinds)
            if needed > max_text_tokens:
                # The states of a text that was encoded whole are not those of its beginning:
                # cutting here would be wrong.
                raise UserError(
                    f"{folder} holds texts of {needed} tokens, more than max_text_tokens = "
                    f"{max_text_tokens}: encode again with that cap"
                )
            self.length = pad_length(needed, max_text_tokens)

    def _leave_out_mute(self, shards: Sequence[records.Shard], faults: BadRecords) -> None:
        """What has no text of the mix at all is in no bucket."""
        start = 0
        for shard in shards:
            for place in sorted(
                set.intersection(*(set(shard.lacking.get(kind, ())) for kind in self._mix.kinds))
            ):
                self.bucket_of[start + place] = -1
                faults.add(
                    f"{shard.file}, record {place}",
                    "missing caption",
                    f"none of the mix: {', '.join(self._mix.kinds)}",
                )
            start += shard.count

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray, bucket: int, draws: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of one bucket, each with the caption that its draw chooses, and mirrored or not as
        its draw says.

        Every number is copied once, from the record's bytes to its place in the batch.
        """
        count = len(indices)
        batch: dict[str, np.ndarray] = {
            "label": np.empty(count, np.int32),
            "size": np.empty((count, 2), np.float32),
            "aspect_ratio": np.full(count, self._ratios[bucket], np.float32),
        }
        keys = []
        if self._mix:
            batch["text_lengths"] = np.empty(count, np.int32)
        for row, (index, draw) in enumerate(zip(indices, draws)):
            arrays, metadata = self._records[int(index)]
            key = metadata["key"]
            keys.append(key)
            side = "_flip" if self.flipped and is_flipped(draw) else ""
            mean, std = arrays[f"mean{side}"], arrays[f"std{side}"]
            if row == 0:
                batch["mean"], batch["std"] = (
                    np.empty((count, *mean.shape), np.float32) for _ in range(2)
                )
            batch["mean"][row], batch["std"][row] = mean, std
            batch["label"][row] = arrays["label"]
            batch["size"][row] = arrays["size"]
            if self._mix:
                states = self._states(arrays, metadata, draw)
                if row == 0:
                    batch["text_states"] = self._memory.empty(
                        (count, self.length, states.shape[-1]), ml_dtypes.bfloat16
                    )
                    # plain integers are copied without the interpreter's lock
                    into = batch["text_states"].view(np.uint16)
                into[row, : len(states)] = states.view(np.uint16)
                into[row, len(states) :] = 0
                batch["text_lengths"][row] = len(states)
        return batch | {"key": np.array(keys)}

    def _states(
        self, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], draw: float
    ) -> np.ndarray:
        """bfloat16 [l, c] of the caption that a draw chooses."""
        kind, rest = self._mix.choose(draw)
        said = metadata.get(f"captions.{kind}")
        if said is None:
            present = [kind for kind in self._mix.kinds if f"captions.{kind}" in metadata]
            if not present:
                raise UserError(f"{metadata['key']}: no text states of kind {kind!r}")
            kind, rest = self._mix.choose(draw, present)
            said = metadata[f"captions.{kind}"]
        return arrays[f"text.{kind}.{int(rest * len(json.loads(said)))}"]


def is_flipped(draw: float) -> bool:
    """Whether a draw takes the mirrored picture: by a far digit of it, which knows nothing of the
    caption that its near ones choose."""
    return bool(int(draw * 2**44) & 1)


def _sizes(buckets: Sequence[tuple[int, int]], most: int = 4) -> str:
    shown = ", ".join(f"{height}×{width}" for height, width in buckets[:most])
    return shown + (f" and {len(buckets) - most} more" if len(buckets) > most else "")

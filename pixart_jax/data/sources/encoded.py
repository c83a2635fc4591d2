"""Encoded shards as a source: keys, captions and sizes from the records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from pixart_jax.data import images, records
from pixart_jax.data.sources.indexed import Choice, Facts, IndexedSource
from pixart_jax.data.sources.sample import Sample
from pixart_jax.errors import UserError


class RecordsSource(IndexedSource):
    """The samples of a folder written by ``encode``: without images, sizes of the originals."""

    def __init__(self, folder: str, choice: Choice):
        self.faults = choice.faults
        self._records = records.Records(folder)
        self.name = f"records:{self._records.folder.resolve().name}"
        manifest = self._records.manifest
        kinds = manifest.identity.get("captions", "").split(",")
        self.caption_kinds = tuple(filter(None, kinds)) or tuple(manifest.longest)
        state = [[shard.file, shard.count, shard.sha256] for shard in manifest.shards]
        self._choose(len(self._records), ["records", state], choice)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in px that the images were cropped to."""
        return tuple(self._records.manifest.by_bucket)

    @property
    def identity(self) -> Mapping[str, str]:
        """What the records were made with (records.Manifest)."""
        return self._records.manifest.identity

    def latents(self, index: int) -> np.ndarray:
        """float32 [height/f, width/f, c]: the posterior's mean, unscaled."""
        record = self._records.bytes(self._place(index))
        return records.decode_record(record, ("mean",))[0]["mean"]

    def _read(self, place: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        return records.decode_record(self._records.bytes(place), ("label", "size"))

    def _key(self, place: int) -> str:
        return self._read(place)[1]["key"]

    def _facts(self, place: int) -> Facts:
        return self._unpack(place)[1]

    def _unpack(self, place: int) -> tuple[str, Facts]:
        arrays, metadata = self._read(place)
        captions = {
            name.removeprefix("captions."): tuple(json.loads(text))
            for name, text in metadata.items()
            if name.startswith("captions.")
        }
        return metadata["key"], Facts(int(arrays["label"]), {}, lambda: captions)

    def _sample(self, place: int) -> Sample:
        key, facts = self._unpack(place)
        return Sample(key, None, facts.captions(), facts.label)

    def _open(self, place: int) -> BinaryIO:
        raise UserError(f"{self.name} holds no pictures; give the set that it was encoded from")

    def _size(self, place: int) -> tuple[int, int]:
        try:
            height, width = self._read(place)[0]["size"]
        except UserError as error:
            raise images.UnreadableImage(str(error)) from None
        return int(height), int(width)

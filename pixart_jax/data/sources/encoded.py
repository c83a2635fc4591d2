"""Encoded shards as a source: keys, captions and sizes out of the records, for whoever counts words
or looks at a set."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from pixart_jax.data import images, records
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources.filters import LazyFields
from pixart_jax.data.sources.listed import IndexedSource
from pixart_jax.data.sources.sample import Sample
from pixart_jax.errors import UserError


class RecordsSource(IndexedSource):
    """The samples of a folder that ``encode`` made; a sample has no picture, and says so where
    pixels are asked for.

    The size is that of the picture before it was encoded. A damaged record is a UserError that
    names shard and record.
    """

    def __init__(
        self,
        folder: str,
        *,
        where: str | None = None,
        limit: int | None = None,
        faults: BadRecords | None = None,
    ):
        self.faults = BadRecords() if faults is None else faults
        self._held = records.Records(folder)
        self.name = f"records:{self._held.folder.resolve().name}"
        manifest = self._held.manifest
        said = manifest.identity.get("captions", "")
        self.caption_kinds = tuple(kind for kind in said.split(",") if kind) or tuple(
            manifest.longest
        )
        self.num_classes = None
        state = [[shard.file, shard.count, shard.sha256] for shard in manifest.shards]
        self._choose(len(self._held), ["records", state], where, limit)

    @property
    def buckets(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in px that its pictures were cropped to."""
        return tuple(dict.fromkeys(shard.bucket for shard in self._held.manifest.shards))

    @property
    def identity(self) -> Mapping[str, str]:
        """What the records were made with (records.Manifest)."""
        return self._held.manifest.identity

    def latents(self, index: int) -> np.ndarray:
        """float32 [height/f, width/f, c]: the posterior's mean, unscaled."""
        return records.decode_record(self._held.bytes(self._place(index)), ("mean",))[0]["mean"]

    def _read(self, place: int) -> tuple[dict, dict[str, str]]:
        return records.decode_record(self._held.bytes(place), ("label", "size"))

    def _key(self, place: int) -> str:
        return self._read(place)[1]["key"]

    def _picture(self, place: int):
        raise UserError(f"{self.name} holds no pictures; give the set that it was encoded from")

    def _size(self, place: int) -> tuple[int, int]:
        try:
            height, width = self._read(place)[0]["size"]
        except UserError as fault:
            raise images.UnreadableImage(str(fault)) from None
        return int(height), int(width)

    def _sample(self, place: int) -> Sample:
        arrays, metadata = self._read(place)
        return Sample(metadata["key"], None, _captions(metadata), int(arrays["label"]))

    def _fields(self, place: int) -> LazyFields:
        arrays, metadata = self._read(place)
        said = _captions(metadata)
        captions = {kind: found[0] if len(found) == 1 else found for kind, found in said.items()}
        height, width = map(int, arrays["size"])
        others = {
            "captions": said,
            "key": metadata["key"],
            "label": int(arrays["label"]),
            "height": height,
            "width": width,
        }
        return LazyFields({**captions, **others}, {})


def _captions(metadata: dict[str, str]) -> dict[str, tuple[str, ...]]:
    return {
        name.removeprefix("captions."): tuple(json.loads(text))
        for name, text in metadata.items()
        if name.startswith("captions.")
    }

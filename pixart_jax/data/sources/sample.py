"""One image with its captions, and the protocol of every source of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError, nearest

Captions = Mapping[str, tuple[str, ...]]
"""Caption kind → its texts; a kind that is missing has none."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """key: the same in every run. image: encoded bytes, or None. label: −1 for none."""

    key: str
    image: bytes | None
    captions: Captions
    label: int = -1

    def pixels(self) -> np.ndarray:
        """Decode to uint8 [height, width, 3], upright. Raises UnreadableImage with the key."""
        return self._decode(images.decode)

    def fitted(self, bucket: tuple[int, int]) -> np.ndarray:
        """Decode, resize and crop to uint8 [bucket height, bucket width, 3]
        (:func:`images.fitted`). Raises UnreadableImage with the key."""
        return self._decode(lambda data: images.fitted(data, bucket)[0])

    def _decode(self, decode: Callable[[bytes], np.ndarray]) -> np.ndarray:
        try:
            if self.image is None:
                raise images.UnreadableImage(
                    "the records of encoded shards hold no picture: give their source"
                )
            return decode(self.image)
        except UserError as error:
            raise images.UnreadableImage(f"{self.key}: {error}") from None

    def texts(self, kind: str) -> tuple[str, ...]:
        """The captions of one kind; a UserError with the key if there are none."""
        if not self.captions.get(kind):
            hint = nearest(kind, self.captions) if self.captions else " (nor any)"
            raise UserError(f"{self.key}: no caption of kind {kind!r}{hint}")
        return self.captions[kind]

    def captions_of_kinds(self, kinds: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The captions of these kinds; a UserError with the key if the sample has none of them."""
        kinds = tuple(kinds)
        found = {kind: self.captions[kind] for kind in kinds if self.captions.get(kind)}
        if kinds and not found:
            known = f"it has: {', '.join(sorted(self.captions))}" if self.captions else "nor any"
            wanted = " or ".join(map(repr, kinds))
            raise UserError(f"{self.key}: no caption of kind {wanted} ({known})")
        return found


@runtime_checkable
class Source(Protocol):
    """Random access to samples, also from several threads. Most sources also have ``faults``: the
    records skipped while opening, and those found bad while captions are read."""

    name: str
    fingerprint: str
    caption_kinds: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: (height, width) in px of every sample, (0, 0) for an unreadable image."""
        ...


def faults_of(source: Source) -> BadRecords:
    """A source's bad records; a new collection for a source that keeps none."""
    found = getattr(source, "faults", None)
    return BadRecords() if found is None else found

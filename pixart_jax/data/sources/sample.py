"""One picture and what is said of it, and the protocol of whatever hands them out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from pixart_jax.data import images
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Sample:
    """One picture and what is said of it.

    key: stable name, the same in every run. image: encoded bytes, or uint8 [h, w, 3] (or [h, w,
    1]); None where only the encoded form of it is there (records). captions: caption kind → one or
    several texts; a kind that is missing has no text.
    label: class, −1 where there is none.
    """

    key: str
    image: bytes | np.ndarray | None
    captions: Mapping[str, tuple[str, ...]]
    label: int = -1

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3], upright; UnreadableImage names the sample where it is no
        readable image."""
        try:
            return (
                images.decode(self._image())
                if isinstance(self.image, bytes)
                else images.as_rgb(self._image())
            )
        except UserError as fault:
            raise images.UnreadableImage(f"{self.key}: {fault}") from None

    def fitted(self, bucket: tuple[int, int]) -> np.ndarray:
        """uint8 [bucket height, bucket width, 3]: resized and cropped as :func:`images.fitted`
        does, fast for a JPEG that is far larger than its bucket; UnreadableImage names the
        sample."""
        try:
            if isinstance(self.image, bytes):
                return images.fitted(self.image, bucket)[0]
            return images.to_bucket(images.as_rgb(self._image()), bucket)[0]
        except UserError as fault:
            raise images.UnreadableImage(f"{self.key}: {fault}") from None

    def size(self) -> tuple[int, int]:
        """(height, width) in px, from the header alone."""
        try:
            return (
                images.size(self.image)
                if isinstance(self.image, bytes)
                else self._image().shape[:2]
            )
        except UserError as fault:
            raise images.UnreadableImage(f"{self.key}: {fault}") from None

    def _image(self) -> bytes | np.ndarray:
        if self.image is None:
            raise images.UnreadableImage(
                "the records of encoded shards hold no picture; give the set that they were "
                "encoded from"
            )
        return self.image

    def texts(self, kind: str) -> tuple[str, ...]:
        """The captions of one kind; UserError names the sample where there is none."""
        if not self.captions.get(kind):
            raise UserError(
                f"{self.key}: no caption of kind "
                f"{kind!r}{nearest(kind, self.captions) if self.captions else ' (nor any)'}"
            )
        return self.captions[kind]

    def captions_of_kinds(self, kinds: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Those of the kinds that the sample has, at least one; UserError names the sample where it
        has none of them (and kinds are wanted at all)."""
        found = {kind: self.captions[kind] for kind in kinds if self.captions.get(kind)}
        if kinds and not found:
            known = (
                f" (it has: {', '.join(sorted(self.captions))})" if self.captions else " (nor any)"
            )
            raise UserError(
                f"{self.key}: no caption of kind {' or '.join(map(repr, kinds))}{known}"
            )
        return found


@runtime_checkable
class Source(Protocol):
    """Random access to samples; threads may read at once. fingerprint: changes whenever the samples
    or their order may have changed. faults (a source that knows of none may lack it): what was left
    out while the set was opened, and what is found while captions are read; an unreadable picture
    is named by whoever reads it, and the set keeps its place.
    """

    name: str
    fingerprint: str
    caption_kinds: tuple[str, ...]
    num_classes: int | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: (height, width) in px of every sample; (0, 0) where the image is
        unreadable."""
        ...


def faults_of(source: Source) -> BadRecords:
    """A source's faults; a fresh collection for one that knows of none."""
    found = getattr(source, "faults", None)
    return BadRecords() if found is None else found

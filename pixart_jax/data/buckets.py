"""Aspect-ratio buckets: which (height, width) an image is resized and cropped to.

All tables derive from the 1024 one, with its keys (height / width as rounded by the released
models). Training uses 40 entries, inference 33: without seven extreme ratios (at 2048 all).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from pixart_jax.errors import UserError

# fmt: off
_LANDSCAPE_OF_1024 = {  # key: (height, width)
    0.25: (512, 2048), 0.26: (512, 1984), 0.27: (512, 1920), 0.28: (512, 1856), 0.32: (576, 1792),
    0.33: (576, 1728), 0.35: (576, 1664), 0.4: (640, 1600), 0.42: (640, 1536), 0.48: (704, 1472),
    0.5: (704, 1408), 0.52: (704, 1344), 0.57: (768, 1344), 0.6: (768, 1280), 0.68: (832, 1216),
    0.72: (832, 1152), 0.78: (896, 1152), 0.82: (896, 1088), 0.88: (960, 1088), 0.94: (960, 1024),
    1.0: (1024, 1024),
}
# The portrait half is not the landscape half's mirror: its keys are their own, and the counterpart
# of 704×1344 is absent.
_PORTRAIT_KEYS = (
    1.07, 1.13, 1.21, 1.29, 1.38, 1.46, 1.67, 1.75, 2.0, 2.09, 2.4, 2.5, 2.89, 3.0, 3.11, 3.62,
    3.75, 3.88, 4.0,
)
# fmt: on
_NOT_AT_INFERENCE = (0.26, 0.27, 2.89, 3.11, 3.62, 3.75, 3.88)
BASES = (256, 512, 1024, 2048)


def _table(base: int) -> dict[float, tuple[int, int]]:
    pairs = reversed(_LANDSCAPE_OF_1024.values())
    mirrored = [(w, h) for h, w in pairs if h != w and (h, w) != (704, 1344)]
    sizes = _LANDSCAPE_OF_1024 | dict(zip(_PORTRAIT_KEYS, mirrored, strict=True))
    return {key: (h * base // 1024, w * base // 1024) for key, (h, w) in sizes.items()}


TABLES: dict[int, dict[float, tuple[int, int]]] = {base: _table(base) for base in BASES}
"""base → {key: (height, width)}: the training tables, 40 entries each, keys ascending."""

_KEYS: dict[tuple[int, ...], float] = {
    size: key for table in TABLES.values() for key, size in table.items()
}

INFERENCE_TABLES: dict[int, dict[float, tuple[int, int]]] = {
    base: {key: size for key, size in table.items() if base == 2048 or key not in _NOT_AT_INFERENCE}
    for base, table in TABLES.items()
}
"""base → {key: (height, width)}: the inference tables, 33 entries (2048: 40)."""


def _sizes(base: int, inference: bool) -> dict[float, tuple[int, int]]:
    if base not in TABLES:
        raise UserError(f"no bucket table for base {base} (one of: {', '.join(map(str, BASES))})")
    return (INFERENCE_TABLES if inference else TABLES)[base]


def _check(height: float, width: float) -> None:
    if not (height > 0 and width > 0):
        raise UserError(
            f"an image of {height}×{width} px has no aspect ratio: both sides must be positive"
        )


def nearest(
    height: float, width: float, base: int = 1024, *, inference: bool = False
) -> tuple[int, int]:
    """(height, width) in px of the bucket whose key is nearest to height / width.

    base: 256, 512, 1024 or 2048. inference: choose among the 33 buckets of sampling.
    """
    _check(height, width)
    sizes, ratio = _sizes(base, inference), height / width
    return sizes[min(sizes, key=lambda key: abs(key - ratio))]


def assign(height: float, width: float, buckets: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The one of a config's own (height, width) buckets for an image of this size: by
    :func:`key_of`. Of one key the largest bucket that the image fills, else the smallest."""
    _check(height, width)
    buckets = tuple((height, width) for height, width in buckets)
    if not buckets:
        raise UserError("no buckets to choose from: name at least one (height, width)")
    ratio = height / width
    keyed = _keyed(buckets)
    nearest = min(keyed, key=lambda key: (abs(key - ratio), key))
    same = keyed[nearest]
    filled = [(h, w) for h, w in same if h <= height and w <= width]
    return max(filled, key=lambda b: b[0]) if filled else min(same, key=lambda b: b[0])


@functools.lru_cache(maxsize=64)
def _keyed(buckets: tuple[tuple[int, int], ...]) -> dict[float, list[tuple[int, int]]]:
    """Key → the buckets that have it."""
    keyed: dict[float, list[tuple[int, int]]] = {}
    for bucket in buckets:
        keyed.setdefault(key_of(bucket), []).append(bucket)
    return keyed


def key_of(bucket: tuple[int, int]) -> float:
    """The aspect ratio fed for a bucket: its key in its table, else height / width."""
    return _KEYS.get(tuple(bucket), bucket[0] / bucket[1])


@dataclasses.dataclass(frozen=True)
class Fit:
    """In px: an image is resized to (height, width), then cropped at (top, left)."""

    height: int
    width: int
    top: int
    left: int


def fit(height: int, width: int, bucket: tuple[int, int]) -> Fit:
    """Resize until the image covers the bucket, then crop the middle, as the released models do."""
    _check(height, width)
    bucket_height, bucket_width = bucket
    if bucket_height / height > bucket_width / width:
        resized = bucket_height, max(bucket_width, int(width * bucket_height / height))
    else:
        resized = max(bucket_height, int(height * bucket_width / width)), bucket_width
    return Fit(
        *resized, round((resized[0] - bucket_height) / 2), round((resized[1] - bucket_width) / 2)
    )

"""How many samples each bucket holds, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pixart_jax import plots

BUCKETS_PNG = "buckets.png"


def write(path: Path, counts: Mapping[tuple[int, int], int], title: str = "") -> Path:
    """A bar for each (height, width) in px, tall buckets last; one that holds nothing has its place
    too. Returns ``path``."""
    ordered = sorted(counts.items(), key=lambda item: (item[0][0] / item[0][1], item[0]))
    total = sum(counts.values())
    values = {f"{height}×{width}": count for (height, width), count in ordered}
    return plots.bars(
        path,
        values,
        title=f"{title or 'samples'}: {total:,} in {len(values)} buckets",
        axis="samples",
    )

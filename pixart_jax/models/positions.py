"""Fixed two-dimensional sine-cosine positions, for any grid.

The coordinate of place i of n along an axis is i · base / n / scale: a grid of any size spans [0,
base / scale), so a model trained at one resolution and ratio reads another. The first half of the
channels encodes x (the column), the second half y (the row); each half is all sines, then all
cosines, of coordinate · 10000^(−j / (dim/4)), j < dim/4.
"""

from __future__ import annotations

import numpy as np


def sincos_1d(count: int, dim: int, base: float, scale: float) -> np.ndarray:
    """[count, dim] fp32: sines and cosines of ``count`` coordinates along one axis (computed in
    fp64)."""
    coordinates = np.arange(count, dtype=np.float64) * base / count / scale
    frequencies = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2))
    angles = coordinates[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_2d(
    height: int, width: int, dim: int, base_size: float, scale: float = 1.0
) -> np.ndarray:
    """[height·width, dim] fp32, rows first: the table added to the patches of a grid of height ×
    width patches."""
    x = sincos_1d(width, dim // 2, base_size, scale)
    y = sincos_1d(height, dim // 2, base_size, scale)
    x = np.broadcast_to(x[None], (height, width, dim // 2))
    y = np.broadcast_to(y[:, None], (height, width, dim // 2))
    return np.concatenate([x, y], axis=-1).reshape(height * width, dim)

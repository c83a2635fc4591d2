"""Canvases larger than the model, denoised in overlapping windows (MultiDiffusion, arXiv
2302.08113), and seamless textures, whose windows wrap around the edges.

At each step the denoiser sees every window as an image of its own, with positions from 0 and the
window's size as its size condition. Predictions are averaged with raised-cosine weights.
MultiDiffusion averages the windows' solver states; all solvers here are linear in the predictions
with weights of time alone, so one state of the whole canvas is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.vae import tile_starts
from pixart_jax.pipeline.sampling_config import SamplingConfig


class Windows(NamedTuple):
    """In latents. overlap: of neighbours, at least. wrap: over the canvas's edges."""

    side: int
    overlap: int
    wrap: bool = False

    def starts(self, length: int) -> list[int]:
        """First latents of the windows along a side, evenly spaced: the last window ends with the
        side, or its end is before the first one's start by the same step."""
        if not self.wrap:
            return tile_starts(length, self.side, self.overlap)
        count = max(2, math.ceil(length / (self.side - self.overlap)))
        return [round(i * length / count) for i in range(count)]

    def along(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(the latents of each window along a side, int [n, side]; their weights, fp32, falling to
        the edges that another window overlaps)."""
        starts = np.array(self.starts(length))
        places = (starts[:, None] + np.arange(self.side)) % length
        inner = np.ones((len(starts), self.side), np.float32)
        if self.overlap:
            ramp = np.sin((np.arange(self.overlap) + 0.5) * np.pi / 2 / self.overlap) ** 2
            first = slice(None) if self.wrap else slice(1, None)
            last = slice(None) if self.wrap else slice(-1)
            inner[first, : self.overlap] *= ramp
            inner[last, self.side - self.overlap :] *= ramp[::-1]
        return places, inner


def plan_windows(
    config: SamplingConfig,
    transformer: TransformerConfig,
    canvas: tuple[int, ...],
    is_reference: bool = False,
) -> Windows | None:
    """The windows of a canvas of (height, width) latents; None where the config asks for none, or
    one is the whole canvas. Raises UserError where they do not fit."""
    if not config.windowed:
        if config.tile_overlap is not None:
            raise UserError("tile overlap needs --tile-window")
        return None
    side = config.tile_window or min(transformer.sample_size, *canvas)
    if side > min(canvas):
        have = "{}×{}".format(*canvas)
        raise UserError(
            f"tile window {side}: the canvas has {have} latents; at most {min(canvas)} fits"
        )
    if side % transformer.patch_size:
        raise UserError(f"tile window {side}: a multiple of {transformer.patch_size} is needed")
    overlap = side // 2 if config.tile_overlap is None else config.tile_overlap
    if not 0 <= overlap <= side // 2:
        raise UserError(f"tile overlap {overlap}: 0 to {side // 2}, half a window, is needed")
    cached = config.blocks_every > 1 or config.block_schedule or config.cross_attention_steps
    if cached or is_reference:
        what = "a reference" if is_reference else "reused blocks or cross-attention"
        raise UserError(f"windows and {what} exclude each other")
    if tuple(canvas) == (side, side) and not config.seamless:
        return None
    return Windows(side, overlap, config.seamless)


def cut(array: jax.Array, windows: Windows) -> jax.Array:
    """[b, h, w, c] → its windows [n, b, side, side, c], row by row."""
    rows, columns = (windows.along(length)[0] for length in array.shape[1:3])
    found = array[:, rows][:, :, :, columns]  # [b, n', side, n'', side, c]
    found = found.transpose(1, 3, 0, 2, 4, 5)
    return found.reshape(-1, len(array), windows.side, windows.side, array.shape[-1])


def over_windows(
    denoise: Callable[[jax.Array, Any], jax.Array],
    x: jax.Array,
    windows: Windows,
    beside: Any = None,
) -> jax.Array:
    """The weighted mean [b, h, w, k] fp32 of denoise(window [b, side, side, c], its row of
    ``beside``) → [b, side, side, k] over the windows of x [b, h, w, c], in a scan. beside: arrays
    [n, …]."""
    (rows, down), (columns, across) = (windows.along(length) for length in x.shape[1:3])
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(columns))]
    places = np.array([(*rows[i], *columns[j]) for i, j in pairs])  # [n, 2·side]
    weights = np.stack([down[i][:, None] * across[j] for i, j in pairs])[..., None]
    total = np.zeros((*x.shape[1:3], 1), np.float32)
    for place, weight in zip(places, weights):
        np.add.at(total, np.ix_(*np.split(place, 2)), weight)

    def add(sums, now):
        place, weight, window, own = now
        output = denoise(window, own).astype(jnp.float32)
        at = sums.at[:, place[: windows.side, None], place[None, windows.side :]]
        return at.add(output * weight, unique_indices=True), None

    cuts = cut(x, windows)
    first = jax.tree.map(lambda a: a[0], (cuts, beside))
    shape = (*x.shape[:3], jax.eval_shape(denoise, *first).shape[-1])
    sums, _ = jax.lax.scan(add, jnp.zeros(shape), (places, weights, cuts, beside))
    return sums / total

"""A row of the parity table: the same weights and inputs through PyTorch and through pixart_jax,
and the difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

# An output that is nearly nothing proves nothing: below this the reference itself is at fault.
LEAST_REFERENCE = 0.05


Outputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """theirs(folder) draws the weights, writes them into the folder and runs the reference;
    ours(folder) reads them and runs ours. measure: 'max' (largest difference over the largest
    reference), 'l2' (of the norms), 'psnr' (decibels of uint8 images; the bound is then a floor).
    tier: 'quick' rows are tiny, 'full' ones at real size, 'slow' ones run with --slow."""

    name: str  # unique, and what --only matches
    model: str
    format: str
    size: str
    theirs: Callable[[Path], Outputs]
    ours: Callable[[Path], Outputs]
    dtype: str = "fp32"
    bound: float = 1e-4
    measure: str = "max"
    tier: str = "quick"

    def compare(self, ours: Outputs, theirs: Outputs) -> dict:
        """{'max', 'l2', 'psnr' (images only)}, the worst over the outputs. ValueError where outputs
        cannot be compared."""
        if set(ours) != set(theirs):
            raise ValueError(f"{self.name}: outputs {sorted(ours)} beside {sorted(theirs)}")
        found: dict[str, list[float]] = {}
        for name in theirs:
            for key, value in errors(ours[name], theirs[name], f"{self.name}: {name}").items():
                found.setdefault(key, []).append(value)
        return {key: (min if key == "psnr" else max)(values) for key, values in found.items()}

    def holds(self, error: Mapping[str, float]) -> bool:
        """Whether a comparison is within the bound; NaN never is."""
        value = error[self.measure]
        return bool(value >= self.bound if self.measure == "psnr" else value <= self.bound)


def errors(ours: np.ndarray, theirs: np.ndarray, what: str) -> dict[str, float]:
    """Relative errors of one output, and of uint8 images the worst peak signal-to-noise ratio."""
    if ours.shape != theirs.shape:
        raise ValueError(f"{what}: {ours.shape} beside {theirs.shape}")
    images = theirs.dtype == np.uint8
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{what}: not finite")
    if np.abs(b).max() < LEAST_REFERENCE or (images and np.ptp(b) < 20):
        raise ValueError(f"{what}: the reference is as good as nothing, so nothing is compared")
    found = {
        "max": float(np.abs(a - b).max() / np.abs(b).max()),
        "l2": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
    }
    if images:
        worst = float(np.square(a - b).reshape(len(a), -1).mean(1).max())
        found["psnr"] = 99.0 if worst == 0 else float(10 * np.log10(255**2 / worst))
    return found

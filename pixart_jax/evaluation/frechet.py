"""Fréchet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017).

    d² = |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½                                             (1)

With any F for which FᵀF = Σ₂, the last trace is the sum of the square roots of the eigenvalues of
F Σ₁ Fᵀ, which is symmetric: eigh gives them without a matrix square root and without complex
numbers. Of n images in fewer than d dimensions F is the centred features over √(n − 1), and an
n × n problem is left; a singular Σ needs no special care.

FID falls as the number of images grows. To first order n images of a Gaussian whose covariance has
the eigenvalues λ are away from it by

    E[d²] = (1/n) [ Σᵢ λᵢ + ½ Σᵢⱼ λᵢλⱼ (1 + δᵢⱼ) / (λᵢ + λⱼ) ]                                   (2)
"""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pixart_jax.errors import UserError, one_line
from pixart_jax.files import atomic_write

_ROWS = 4096  # accumulated at a time
_Z = 1.959964  # 95%


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Of ``count`` images: mean [d] and covariance [d, d] (divisor n − 1), float64. rows: the
    centred features over √(n − 1), [n, d], where n is below d."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    rows: np.ndarray | None = None

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """F [k, d] with FᵀF = covariance."""
        if self.rows is not None:
            return self.rows
        values, vectors = np.linalg.eigh(self.covariance)
        return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T

    @functools.cached_property
    def eigenvalues(self) -> np.ndarray:
        """Of the covariance; of few images those that are not 0."""
        gram = self.covariance if self.rows is None else self.rows @ self.rows.T
        return np.maximum(np.linalg.eigvalsh(gram), 0)


def statistics(features: np.ndarray) -> Statistics:
    """Of features [n, d]. In float64, from slices of the same rows whatever made them, so the
    result is one to the bit."""
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"features {list(features.shape)}: at least 2 images are needed")
    n, d = features.shape
    mean, scatter = features.mean(0, dtype=np.float64), np.zeros((d, d))
    for start in range(0, n, _ROWS):  # the whole set in float64 would take twice its memory
        part = features[start : start + _ROWS] - mean
        scatter += part.T @ part
    rows = (features - mean) / np.sqrt(n - 1) if n < d else None
    return Statistics(mean, scatter / (n - 1), n, rows)


def distance(a: Statistics, b: Statistics) -> float:
    """Equation 1."""
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features of {len(a.mean)} and {len(b.mean)} dimensions do not compare")
    return _sum(a, b, _roots(np.linalg.eigvalsh(_product(a, b))))


def _product(a: Statistics, b: Statistics) -> np.ndarray:
    """F Σ₁ Fᵀ; with the F of ``a`` and Σ₂ where ``a`` is of few images."""
    if a.rows is not None:
        return a.rows @ b.covariance @ a.rows.T
    return b.factor @ a.covariance @ b.factor.T


def _roots(spectrum: np.ndarray) -> np.ndarray:
    """Square roots of eigenvalues, ascending; 0 for what is rounding of a singular matrix."""
    return np.sqrt(np.where(spectrum > 8 * np.finfo("f8").eps * spectrum[-1], spectrum, 0))


def _sum(a: Statistics, b: Statistics, roots: np.ndarray) -> float:
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(((a.mean - b.mean) ** 2).sum() + traces - 2 * roots.sum())


class Comparison(NamedTuple):
    """value: equation 1. interval: 95%, of the sampling of the first set at its n, the second as it
    is. bias: equation 2 for both n, what two sets of one distribution would be apart, where n is
    above d."""

    value: float
    interval: tuple[float, float]
    bias: float


def compare(features: np.ndarray, a: Statistics, b: Statistics) -> Comparison:
    """features [n, d] of statistics ``a``, against ``b``.

    The interval is the delta method's: the standard error of the mean of each image's influence on
    equation 1, whose derivative by Σ₁ is 1 − Fᵀ (F Σ₁ Fᵀ)^-½ F.
    """
    x, step = np.asarray(features, np.float64) - a.mean, a.mean - b.mean
    values, vectors = np.linalg.eigh(_product(a, b))
    roots = _roots(values)
    if a.rows is not None:  # the eigenvectors of the n × n problem are the images' own
        pulled = (a.count - 1) * vectors**2 @ roots
    else:
        keep = roots > 0
        pulled = ((x @ (b.factor.T @ vectors[:, keep])) ** 2) @ (1 / roots[keep])
    influence = (x**2).sum(1) + 2 * x @ step - pulled
    error = float(_Z * influence.std(ddof=1) / np.sqrt(a.count))
    value = _sum(a, b, roots)
    shares = sum(1 / n for n in (a.count, b.count) if n)  # 0: the file does not say
    bias = shares * bias_times_n(a.eigenvalues)
    return Comparison(value, (max(0.0, value - error), value + error), bias)


def bias_times_n(eigenvalues: np.ndarray) -> float:
    """The bracket of equation 2."""
    some = eigenvalues[eigenvalues > 0]
    pairs = some[:, None] * some / (some[:, None] + some)
    return float(some.sum() + (pairs.sum() + np.trace(pairs)) / 2)


def extrapolate(
    features: np.ndarray, b: Statistics, points: int = 15, seed: int = 2020
) -> tuple[float, list[tuple[int, float]]]:
    """(FID at infinitely many images, the points (n, FID)): the intercept of a line in 1/n through
    random subsets of 5,000 images, or half of fewer, to all of them (Chong and Forsyth 2020)."""
    rng, most = np.random.default_rng(seed), len(features)
    sizes = np.unique(np.linspace(max(2, min(5000, most // 2)), most, points).astype(int))
    found = []
    for n in map(int, sizes):
        chosen = np.sort(rng.choice(most, n, replace=False))
        found.append((n, distance(statistics(features[chosen]), b)))
    _, intercept = np.polyfit([1 / n for n, _ in found], [value for _, value in found], 1)
    return float(intercept), found


# ---- files ----


def write(path: Path, parts: Mapping[str, Statistics], facts: Mapping[str, object]) -> None:
    """Write statistics as .npz. parts: "" under mu and sigma, as pytorch-fid and clean-fid read
    them, "_s" (sFID) under mu_s and sigma_s, as ADM's. facts: n, mode, weights … beside them."""
    arrays = {f"mu{end}": of.mean for end, of in parts.items()}
    arrays |= {f"sigma{end}": of.covariance for end, of in parts.items()}
    with atomic_write(path) as file:
        np.savez(file, **arrays, **{name: np.asarray(value) for name, value in facts.items()})


def read(path: Path) -> tuple[dict[str, Statistics], dict[str, Any], bool]:
    """({"": statistics, "_s": …}, the other values, whether it holds images) of an .npz of ours,
    pytorch-fid's, clean-fid's or ADM's. ``count`` is 0 where the file does not say it. Raises
    UserError for a file without mu and sigma, and without images (arr_0)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if name != "arr_0"]
            held = {name: file[name] for name in names}
            images = "arr_0" in file.files
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz of statistics: {one_line(error)}") from None
    facts = {n: v.item() for n, v in held.items() if v.ndim == 0 and v.dtype.kind in "iufUb"}
    if images and "mu_s" in held:  # ADM's evaluator knows no other mode
        facts.setdefault("mode", "tensorflow")
    parts = {}
    for end in ("", "_s"):
        mean, covariance = held.get(f"mu{end}"), held.get(f"sigma{end}")
        if mean is None or covariance is None:
            continue
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not mean.size:
            shown = f"mu{end} {list(mean.shape)}, sigma{end} {list(covariance.shape)}"
            raise UserError(f"{path}: {shown}: [d] and [d, d] are needed")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError(f"{path}: mu{end} or sigma{end} holds NaN or infinity")
        count = int(facts.get("n", 0))
        parts[end] = Statistics(mean.astype("f8"), covariance.astype("f8"), count)
    if "" not in parts and not images:
        keys = ", ".join(sorted(held)) or "nothing"
        raise UserError(f"{path} holds no mu and sigma (it holds {keys})")
    return parts, facts, images

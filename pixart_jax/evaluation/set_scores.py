"""Other scores of sets of features: KID, CMMD, the Inception score, precision and recall.

KID: Bińkowski et al. 2018. Inception score: Salimans et al. 2016. Precision and recall:
Kynkäänniemi et al. 2019. Density and coverage: Naeem et al. 2020.
"""

from __future__ import annotations

import numpy as np
from scipy import special

_ROWS = 1024  # of a matrix of distances at a time


def kid(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation, over pairs of random subsets, of the unbiased MMD² under the
    kernel (x·y / d + 1)³. a [n, d], b [m, d]; subsets of fewer than ``size`` where there are fewer
    images. It may be a little below 0."""
    rng, size = np.random.RandomState(seed), min(size, len(a), len(b))

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    values = []
    for _ in range(subsets):
        x, y = (s[rng.choice(len(s), size, replace=False)].astype("f8") for s in (a, b))
        xx, yy = (k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
        values.append((xx + yy) / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return float(np.mean(values)), float(np.std(values))


def cmmd(a: np.ndarray, b: np.ndarray) -> float:
    """1000 · MMD² of L2-normalised CLIP embeddings [n, d] and [m, d] under exp(−‖x − y‖² / 200),
    the pairs of an image with itself counted (Jayasumana et al. 2024)."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        total = sum(float(np.exp(squares / -200).sum()) for _, squares in _squares(x, y))
        return total / (len(x) * len(y))

    return 1000 * (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp(mean KL(p(class | image) ‖ p(class))). logits
    [n, 1008], without bias."""
    logits = logits[np.random.RandomState(seed).permutation(len(logits))].astype("f8")
    log_p = special.log_softmax(logits, axis=1)
    scores = []
    for part in np.array_split(log_p, min(splits, len(log_p))):
        p = np.exp(part)
        log_mean = np.log(np.maximum(p.mean(0), 1e-300))
        scores.append(np.exp((p * (part - log_mean)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> dict[str, float]:
    """precision: share of generated images within the ball of a real one, whose radius reaches its
    k-th neighbour; recall: the reverse. density: real balls that hold a generated image, over k;
    coverage: share of real balls that hold one."""
    balls = {"generated": _radii(generated, k), "real": _radii(real, k)}
    inside = np.zeros(len(generated))  # real balls around each generated image
    covered, recalled = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for start, squares in _squares(generated, real):
        rows = slice(start, start + len(squares))
        within = squares <= balls["real"]
        inside[rows] = within.sum(1)
        covered |= within.any(0)
        recalled |= (squares <= balls["generated"][rows, None]).any(0)
    return {
        "precision": float((inside > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(inside.mean() / k),
        "coverage": float(covered.mean()),
    }


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each of x [n, d] to its k-th neighbour, itself left out."""
    radii = np.zeros(len(x))
    for start, squares in _squares(x, x):
        own = np.arange(len(squares))
        squares[own, start + own] = -1
        radii[start : start + len(squares)] = np.partition(squares, k, axis=1)[:, k]
    return radii


def _squares(a: np.ndarray, b: np.ndarray):
    """Yield (first row, squared distances [rows, m]) of a [n, d] from b [m, d], in float64."""
    b = b.astype("f8")
    norms = (b**2).sum(1)
    for start in range(0, len(a), _ROWS):
        x = a[start : start + _ROWS].astype("f8")
        yield start, np.maximum((x**2).sum(1)[:, None] + norms - 2 * x @ b.T, 0)

"""Random parameters without a compiled init: most of a small model's init is random numbers."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np


def normal_like(shapes, scale: float = 0.2, seed: int = 0):
    """Normal values of this width, fp32, in a tree of shapes: none is zero or at its init."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: (rng.normal(size=s.shape) * scale).astype(np.float32), nn.unbox(shapes)
    )


def normal_params(init, *arguments, scale: float = 0.2, seed: int = 0):
    """The tree that ``init(key, *arguments)`` makes, filled with normal values."""
    return normal_like(jax.eval_shape(init, jax.random.key(0), *arguments), scale, seed)

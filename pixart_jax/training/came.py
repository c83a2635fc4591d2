"""CAME: confidence-guided adaptive memory-efficient optimisation (Luo et al. 2023, arXiv
2307.02047), for Optax.

For a matrix, with gradient g and all moments zero at the start (Algorithm 2; no bias correction):

    v̂ = row ⊗ col / mean(row)         row, col: running means (β2) of g² + ε1 over columns and rows
    u = g / √v̂ ,  û = u / max(1, RMS(u) / d)                                        d = 1
    m = β1 · m + (1 − β1) · û
    S = (û − m)² + ε2, factored with β3 into R and C as above;    update = m / √(R ⊗ C / mean(R))

A vector keeps a full v, and its update is m. The average and RMS are each layer's own: parameters
stacked over layers are treated layer by layer, as they would be apart. A convolution factors its
last two axes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Factors(NamedTuple):
    """Running second moment: row [..., n] and col [..., m] of [..., n, m]; or full, for vectors."""

    row: Any = None
    col: Any = None
    full: Any = None


class CameState(NamedTuple):
    mean: optax.Params  # m
    second: optax.Params  # Factors of g², a parameter
    residual: optax.Params  # Factors of (û − m)²; empty for vectors


def scale_by_came(
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float = 0.9999,
    eps: tuple[float, float] = (1e-30, 1e-16),
    clip: float = 1.0,
    stacked=None,
) -> optax.GradientTransformation:
    """The update m / √S̃ above (to be scaled by −learning rate).

    stacked: a tree of bools like the parameters, true where the first axis counts layers; None:
    nowhere.
    """

    def layers(tree):
        return jax.tree.map(lambda _: False, tree) if stacked is None else stacked

    def factored(shape, is_stacked):
        return len(shape) - bool(is_stacked) >= 2

    def factors(p, is_stacked, vectors):
        if factored(p.shape, is_stacked):
            return Factors(
                row=jnp.zeros(p.shape[:-1], jnp.float32),
                col=jnp.zeros(p.shape[:-2] + p.shape[-1:], jnp.float32),
            )
        return Factors(full=jnp.zeros(p.shape, jnp.float32) if vectors else None)

    def init(params):
        return CameState(
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
            jax.tree.map(lambda p, s: factors(p, s, True), params, layers(params)),
            jax.tree.map(lambda p, s: factors(p, s, False), params, layers(params)),
        )

    def follow(old: Factors, square, decay) -> Factors:
        return Factors(
            row=decay * old.row + (1 - decay) * square.mean(-1),
            col=decay * old.col + (1 - decay) * square.mean(-2),
        )

    def inverse_root(f: Factors):  # 1 / √(row ⊗ col / mean(row))
        return (
            jax.lax.rsqrt(f.row / f.row.mean(-1, keepdims=True))[..., None]
            * jax.lax.rsqrt(f.col)[..., None, :]
        )

    def one(g, m, second, residual, is_stacked):
        square = jnp.square(g) + eps[0]
        matrix = factored(g.shape, is_stacked)
        if matrix:
            second = follow(second, square, b2)
            u = g * inverse_root(second)
        else:
            second = Factors(full=b2 * second.full + (1 - b2) * square)
            u = g * jax.lax.rsqrt(second.full)
        axes = tuple(range(1 if is_stacked else 0, g.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(u), axis=axes, keepdims=True))
        u = u / jnp.maximum(1.0, rms / clip)
        m = b1 * m + (1 - b1) * u
        if not matrix:
            return m, m, second, residual
        residual = follow(residual, jnp.square(u - m) + eps[1], b3)
        return m * inverse_root(residual), m, second, residual

    def update(updates, state, params=None):
        del params
        treedef = jax.tree.structure(updates)
        columns = map(treedef.flatten_up_to, (updates, *state, layers(updates)))
        results = [one(*leaf) for leaf in zip(*columns, strict=True)]
        new, *moments = (treedef.unflatten(column) for column in zip(*results, strict=True))
        return new, CameState(*moments)

    return optax.GradientTransformation(init, update)

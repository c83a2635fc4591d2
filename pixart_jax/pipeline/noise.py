"""The noise that images are sampled from: each image's own, from its seed and index alone; and the
way from one image's noise and text to another's."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def starting_noise(
    seeds: Sequence[int], indices: Sequence[int], shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """(noise [n, *shape] fp32, keys [n] for solvers that add noise): image i's come from
    fold_in(key(seeds[i]), indices[i]) alone. A seed's high word comes first."""
    words = np.array([(value % 2**32, value >> 32) for value in seeds], np.uint32)
    return _noise(words, np.asarray(indices, np.uint32), shape)


@functools.partial(jax.jit, static_argnames="shape")
def _noise(seeds, indices, shape):
    def row(seed, index):  # seed: uint32 [2], low and high word
        key = jax.random.key(seed[0])
        key = jnp.where(seed[1] > 0, jax.random.fold_in(key, seed[1]), key)
        key = jax.random.fold_in(key, index)
        return jax.random.normal(key, shape), jax.random.fold_in(key, 1)

    return jax.vmap(row)(seeds, indices)


@jax.jit
def slerp(a: jax.Array, b: jax.Array, share: float) -> jax.Array:
    """Noise [n, …] on the great circle from a to b, image by image."""
    axes = tuple(range(1, a.ndim))
    norms = jnp.sqrt((a**2).sum(axes, keepdims=True) * (b**2).sum(axes, keepdims=True))
    angle = jnp.arccos(jnp.clip((a * b).sum(axes, keepdims=True) / norms, -1, 1))
    wide = jnp.sin(angle)
    near = wide < 1e-4  # the same direction
    weights = (
        jnp.where(near, plain, jnp.sin(plain * angle) / jnp.where(near, 1, wide))
        for plain in (1 - share, share)
    )
    return sum(weight * noise for weight, noise in zip(weights, (a, b)))


@jax.jit
def between(a, b, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(states [n, l, c], lengths [n]) a share [n] of the way from the texts a to the texts b; a
    itself, to the bit, at 0. The shorter text repeats its last token, which ends every text."""

    def filled(states, lengths):
        places = jnp.minimum(jnp.arange(states.shape[1]), lengths[:, None] - 1)
        return jnp.take_along_axis(states, places[..., None], axis=1)

    part = share[:, None, None]
    states = jnp.where(part > 0, (1 - part) * filled(*a) + part * filled(*b), a[0])
    return states, jnp.where(share > 0, jnp.maximum(a[1], b[1]), a[1])

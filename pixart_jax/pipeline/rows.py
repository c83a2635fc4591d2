"""What the images of one call of the pipeline have of their own, noise too, and what they share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError
from pixart_jax.pipeline import editing
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.windows import Windows

DEFAULT_BATCH = 16
Seed = int | str  # of 64 bits; its decimal digits where JSON would round it
Toward = tuple[str, Seed, int, float]  # prompt, seed, index, share of the way


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of a call. index: folded into the seed. canvas: what it is edited from. toward:
    what its text and noise move to, and control: the condition, uint8 [h, w, 3]; all rows of a call
    have one, or none."""

    prompt: str
    negative: str
    seed: int
    index: int
    guidance: float
    canvas: editing.Canvas | None
    toward: Toward | None = None
    control: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What the batches of a call have in common. start: the first step."""

    config: SamplingConfig
    start: int = 0
    reference: bool = False
    windows: Windows | None = None


def one_each(what: str, value, count: int) -> list:
    """One value for all, or a sequence of one a prompt, as a list."""
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray | jax.Array):
        return [value] * count
    if len(value) != count:
        number = f"{len(value)} {what}s for {count} prompts"
        raise UserError(f"{number}: give one for all, or one each")
    return list(value) if isinstance(value, Sequence) else value.tolist()


def in_batches(
    rows: list[Row], batch_size: int | None, padded: Callable[[int, bool], int]
) -> Iterator[tuple[list[int], list[Row]]]:
    """(positions, their rows) of batches of one size, the last one filled up by its last row; all
    rows of a batch are guided, or none is. padded(size, guided): as devices need."""
    for guided in (True, False):
        group = [n for n, row in enumerate(rows) if (row.guidance != 1) == guided]
        size = padded(batch_size or min(len(group), DEFAULT_BATCH), guided)
        for start in range(0, len(group), size or 1):
            positions = group[start : start + size]
            filled = positions + [positions[-1]] * (size - len(positions))
            yield positions, [rows[n] for n in filled]


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

"""Whether numbers are finite: of weights while they are copied, of latents and pixels in the
programs that compute them, and of all that is written. The one place that asks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError

WHAT = "not finite (NaN or infinity)"
CURE = "a smaller guidance or dtype float32 may help"


class NotFinite(UserError):
    """Images that are not finite. indices: their numbers in the call, ascending."""

    def __init__(self, indices: Iterable[int]):
        self.indices = sorted(map(int, indices))
        shown = ", ".join(map(str, self.indices[:10])) + (", …" if self.indices[10:] else "")
        super().__init__(f"not finite (index from 0): image {shown}; {CURE}")


def not_written(images: Sequence[Mapping[str, Any]], total: int) -> UserError:
    """The error for these images (their settings), of ``total``, which are not finite."""
    named = [
        f"prompt {image['index'] + 1}, {image['prompt'][:40]!r} (index {image['index']}, seed "
        f"{image['seed']})"
        for image in images[:10]
    ]
    shown = "; ".join(named) + ("; …" if images[10:] else "")
    return UserError(f"{len(images)} of {total} images are {WHAT}, not written: {shown}; {CURE}")


def rows(*arrays: jax.Array) -> jax.Array:
    """bool [n]: whether row i of every array [n, …] is finite, and the sum of its squares too:
    norms turn latents of 1e30 into an even gray. Traced into the program that computes the arrays,
    it costs no pass of its own."""
    wide = (array.astype(jnp.float32) for array in arrays)
    squares = (jnp.square(array).sum(tuple(range(1, array.ndim))) for array in wide)
    return functools.reduce(operator.and_, map(jnp.isfinite, squares))


rows_jit = jax.jit(rows)


def check_rows(flags: np.ndarray) -> None:
    """Raise NotFinite for the images whose flag is False."""
    if not flags.all():
        raise NotFinite(np.flatnonzero(~flags))


def whole(array: np.ndarray) -> bool:
    """Whether a host array is finite throughout. Integers are. Compares bits: numpy's own functions
    are slow for bfloat16."""
    if array.dtype.kind in "biu" or array.dtype.itemsize == 1:
        return True
    bits = np.dtype(f"u{array.dtype.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits)
    return bool((array.view(bits) << 1).max(initial=0) < infinity << 1)  # without the sign


def check_images(images: np.ndarray) -> np.ndarray:
    """The images [n, h, w, c] of the host. Raises NotFinite."""
    check_rows(np.array([whole(image) for image in images], bool))
    return images


def check_tensor(name: str, array: np.ndarray) -> np.ndarray:
    """The tensor. Raises UserError, which names it, where it is not finite."""
    if not whole(array):
        raise UserError(f"{name} holds numbers that are {WHAT}")
    return array

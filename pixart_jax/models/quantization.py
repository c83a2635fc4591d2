"""Weight-only int8: a kernel is stored as int8 values with one fp32 scale per output channel, and
multiplied as floats.

Arrays and rounding are Qwix's, which takes 0.4 s to import: import this module only where something
is quantised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix

from pixart_jax.parallel.axes import EMBED

VALUES = jnp.int8


def quantize(kernel: jax.Array) -> qwix.QArray:
    """kernel [..., in, out] of any float dtype → .qvalue int8 [..., in, out] and .scale fp32 [...,
    1, out].

    There is a scale, the largest magnitude / 127.5, for every leading index (a layer of stacked
    blocks) and output channel; the rounding error is at most half a step.
    """
    channels = (*range(kernel.ndim - 2), kernel.ndim - 1)
    return qwix.quantize(kernel.astype(jnp.float32), VALUES, channelwise_axes=channels)


def dequantize(kernel: qwix.QArray, axes: tuple[str | None, str | None], dtype) -> jax.Array:
    """[in, out] in dtype; the product with the fp32 scale is rounded once.

    axes: the kernel's logical names. On a mesh the int8 values, not the floats, are gathered along
    EMBED.
    """
    inputs, outputs = (None if axis == EMBED else axis for axis in axes)
    gathered = kernel.replace(
        qvalue=nn.with_logical_constraint(kernel.qvalue, (inputs, outputs)),
        scale=nn.with_logical_constraint(kernel.scale, (None, outputs)),
    )
    return qwix.dequantize(gathered).astype(dtype)


def quantized(init: Callable, axes: tuple[str | None, str | None]) -> Callable:
    """An initializer of [in, out] → one of quantised kernels; axes: the kernel's logical names."""

    def quantized_init(key, shape, dtype=jnp.float32):
        kernel = quantize(init(key, shape, dtype))
        names = kernel.replace(qvalue=axes, scale=(None, axes[-1]))
        return jax.tree.map(nn.LogicallyPartitioned, kernel, names)

    return quantized_init


# ---- loading, one layer at a time ----

_quantize_rows = jax.jit(
    lambda matrix: qwix.quantize(matrix.astype(jnp.float32), VALUES, channelwise_axes=(0,))
)


def applies(path: str) -> bool:
    """Whether a parameter, by its path ('blocks/q/kernel'), is stored as int8: kernels are;
    embeddings, norms and biases are not."""
    return path.rpartition("/")[2] == "kernel"


def quantize_matrix(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel in PyTorch's layout, [out, in] of any float dtype → (int8 [in, out], scale fp32 [1,
    out]); equal to ``quantize`` to the bit, and faster, because a channel is contiguous."""
    one = _quantize_rows(jnp.asarray(matrix))
    return np.asarray(one.qvalue).T, np.asarray(one.scale).T


def leaf(values: Any, scale: Any) -> qwix.QArray:
    """The parameter tree's leaf of int8 values [..., in, out] and fp32 scales [..., 1, out]."""
    kind = jax.eval_shape(quantize, jax.ShapeDtypeStruct(values.shape, jnp.float32))
    return dataclasses.replace(kind, qvalue=values, scale=scale)

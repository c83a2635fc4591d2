"""Weight-only int8: a kernel is held as int8 values with one fp32 scale an output channel, and
multiplied as floats.

The arrays and the rounding are Qwix's. Imported only where something is quantised: Qwix takes 0.4 s
to import.
"""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix

from pixart_jax.parallel.axes import EMBED

VALUES = jnp.int8


def quantize(kernel: jax.Array) -> qwix.QArray:
    """kernel [..., in, out] of any float dtype → .qvalue int8 [..., in, out] and .scale fp32 [...,
    1, out].

    Every leading index (a layer of stacked blocks) and every output channel has a scale of its own,
    the largest magnitude over 127.5, so no value is further than half a step from what it stands
    for.
    """
    channels = (*range(kernel.ndim - 2), kernel.ndim - 1)
    return qwix.quantize(kernel.astype(jnp.float32), VALUES, channelwise_axes=channels)


def dequantize(kernel: qwix.QArray, axes: tuple[str, str], dtype) -> jax.Array:
    """[in, out] in dtype. The product with the scale is rounded once: the scale stays fp32 until
    then.

    axes: the kernel's logical names. On a mesh it is gathered along EMBED before it becomes floats:
    what goes over the wires is int8.
    """
    inputs, outputs = (None if axis == EMBED else axis for axis in axes)
    gathered = kernel.replace(
        qvalue=nn.with_logical_constraint(kernel.qvalue, (inputs, outputs)),
        scale=nn.with_logical_constraint(kernel.scale, (None, outputs)),
    )
    return qwix.dequantize(gathered).astype(dtype)


def quantized(init: Callable, axes: tuple[str | None, str | None]) -> Callable:
    """An initializer of [in, out] → one that quantises what it draws; axes: the kernel's logical
    names, and its scale's where they fit."""

    def draw(key, shape, dtype=jnp.float32):
        drawn = quantize(init(key, shape, dtype))
        names = drawn.replace(qvalue=axes, scale=(None, axes[-1]))
        return jax.tree.map(nn.LogicallyPartitioned, drawn, names)

    return draw

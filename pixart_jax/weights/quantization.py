"""Int8 kernels as they are loaded: one parameter at a time, a layer of it at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from pixart_jax.models import quantization

_quantize = jax.jit(quantization.quantize)


def quantize(path: str, array: np.ndarray) -> qwix.QArray | None:
    """What an encoder with ``quantization="int8"`` holds at a path; None where it holds the array as it is.

    path: 'blocks/q/kernel'. array: [in, out] or stacked [layers, in, out], any float dtype, on the host. Kernels alone are
    quantised; the embedding, norms and biases are read as they are. The leaf is a Qwix array of two arrays on the host, qvalue int8
    of the array's shape and scale fp32 [..., 1, out], in whose place the module's shardings have a leaf of the same make. Layers do not
    know of each other: parts of a stack give the parts of its leaf. Beside array and leaf one layer is held in fp32.
    """
    if path.rpartition("/")[2] != "kernel":
        return None
    values = np.empty(array.shape, np.int8)
    scale = np.empty((*array.shape[:-2], 1, array.shape[-1]), np.float32)
    for layer in np.ndindex(array.shape[:-2]):
        one = _quantize(jnp.asarray(array[layer]))
        values[layer], scale[layer] = one.qvalue, one.scale
    return dataclasses.replace(jax.eval_shape(quantization.quantize, array), qvalue=values, scale=scale)

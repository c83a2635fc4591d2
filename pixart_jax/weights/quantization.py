"""Int8 kernels as they are loaded: one parameter at a time, a layer of it at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from pixart_jax.models import quantization

_quantize = jax.jit(quantization.quantize)
_quantize_rows = jax.jit(lambda matrix: qwix.quantize(matrix.astype(jnp.float32), quantization.VALUES, channelwise_axes=(0,)))


def applies(path: str) -> bool:
    """Whether the parameter at a path ('blocks/q/kernel') is held as int8: kernels are; the embedding, norms and biases are not."""
    return path.rpartition("/")[2] == "kernel"


def quantize_matrix(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel as PyTorch's files hold it, [out, in] of any float dtype → (int8 [in, out], scale fp32 [1, out]); the values of
    :func:`quantize` to the bit, at a fraction of its time: every channel lies in one run."""
    one = _quantize_rows(jnp.asarray(matrix))
    return np.asarray(one.qvalue).T, np.asarray(one.scale).T


def leaf(values: object, scale: object) -> qwix.QArray:
    """The parameter tree's leaf of int8 values [..., in, out] and scales fp32 [..., 1, out]."""
    kind = jax.eval_shape(quantization.quantize, jax.ShapeDtypeStruct(values.shape, jnp.float32))
    return dataclasses.replace(kind, qvalue=values, scale=scale)


def quantize(path: str, array: np.ndarray) -> qwix.QArray | None:
    """What an encoder with ``quantization="int8"`` holds at a path; None where it holds the array as it is.

    path: 'blocks/q/kernel'. array: [in, out] or stacked [layers, in, out], any float dtype, on the host. Kernels alone are
    quantised; the embedding, norms and biases are read as they are. The leaf is a Qwix array of two arrays on the host, qvalue int8
    of the array's shape and scale fp32 [..., 1, out], in whose place the module's shardings have a leaf of the same make. Layers do not
    know of each other: parts of a stack give the parts of its leaf. Beside array and leaf one layer is held in fp32.
    """
    if not applies(path):
        return None
    values = np.empty(array.shape, np.int8)
    scale = np.empty((*array.shape[:-2], 1, array.shape[-1]), np.float32)
    for layer in np.ndindex(array.shape[:-2]):
        one = _quantize(jnp.asarray(array[layer]))
        values[layer], scale[layer] = one.qvalue, one.scale
    return leaf(values, scale)

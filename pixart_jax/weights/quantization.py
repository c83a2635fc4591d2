"""Int8 kernels as they are loaded: one parameter at a time, a layer of it at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import qwix

from pixart_jax.models import quantization

_quantize_rows = jax.jit(
    lambda matrix: qwix.quantize(
        matrix.astype(jnp.float32), quantization.VALUES, channelwise_axes=(0,)
    )
)


def applies(path: str) -> bool:
    """Whether the parameter at a path ('blocks/q/kernel') is held as int8: kernels are; the
    embedding, norms and biases are not."""
    return path.rpartition("/")[2] == "kernel"


def quantize_matrix(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A kernel as PyTorch's files hold it, [out, in] of any float dtype → (int8 [in, out], scale
    fp32 [1, out]); the values of models.quantization.quantize to the bit, at a fraction of its
    time: every channel lies in one run."""
    one = _quantize_rows(jnp.asarray(matrix))
    return np.asarray(one.qvalue).T, np.asarray(one.scale).T


def leaf(values: object, scale: object) -> qwix.QArray:
    """The parameter tree's leaf of int8 values [..., in, out] and scales fp32 [..., 1, out]."""
    kind = jax.eval_shape(quantization.quantize, jax.ShapeDtypeStruct(values.shape, jnp.float32))
    return dataclasses.replace(kind, qvalue=values, scale=scale)

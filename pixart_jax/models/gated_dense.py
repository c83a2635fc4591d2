"""gate · (x · kernel + bias), whose gradient does without the product itself.

A block adds its MLP's output times a gate to the stream. The gate's gradient is a sum over the tokens n of dy · (x · kernel + bias): for
that sum alone, a remat policy that does not keep the output has the last product of the MLP computed again, 1/15 of XL/2's train step.
The same numbers come from the product that the kernel's gradient needs anyway. With m = xᵀ · dy of one sample,

  dgate[o] = Σ_n dy[n, o] · (Σ_i x[n, i] · kernel[i, o] + bias[o]) = Σ_i kernel[i, o] · m[i, o] + bias[o] · Σ_n dy[n, o]
  dkernel  = Σ_samples gate · m

The price is m for each sample instead of once for all. Against a product over n tokens its passes through memory are cheap where
arithmetic is dear, on a CPU; elsewhere, and on several devices, nobody has measured it, and the plain way stays.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pixart_jax.models.attention import platform

SAMPLES = 8  # at most: each has an m of the kernel's size, and its own lines in the program
RECOMPUTING = ("full", "attention_out", "offload")  # the policies of models/remat.py that keep no output of an MLP


def pays(remat: str, samples: int) -> bool:
    """Whether a block under this remat policy, of a batch of so many samples, multiplies by its gate in this way."""
    devices = max(jax.sharding.get_abstract_mesh().size, 1)
    return remat in RECOMPUTING and samples <= SAMPLES and platform() == "cpu" and devices == 1


@jax.custom_vjp
def gated_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, gate: jax.Array) -> jax.Array:
    """x [b, n, i], kernel [i, o], bias [o], gate [b, o], all of one dtype → [b, n, o]."""
    return gate[:, None] * (jnp.dot(x, kernel) + bias)


def _forward(x, kernel, bias, gate):
    return gated_dense(x, kernel, bias, gate), (x, kernel, bias, gate)


def _backward(kept, dy):
    x, kernel, bias, gate = kept
    dx = jnp.dot(gate[:, None] * dy, kernel.T)
    over_tokens = dy.sum(1, dtype=jnp.float32)  # [b, o]
    dkernel, dgate = jnp.float32(0), []
    for sample in range(len(x)):  # matrices, not a batch of them: XLA for CPUs sums those slowly
        m = jnp.dot(x[sample].T, dy[sample], preferred_element_type=jnp.float32)
        dkernel += gate[sample] * m
        dgate.append((m * kernel).sum(0))
    dgate = jnp.stack(dgate) + over_tokens * bias
    dbias = (over_tokens * gate).sum(0)
    return dx, dkernel.astype(kernel.dtype), dbias.astype(bias.dtype), dgate.astype(gate.dtype)


gated_dense.defvjp(_forward, _backward)

"""Low-rank adapters of a model's kernels: LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353).

An adapter is a nested dict that mirrors ``params``, with a dict of fp32 arrays in the place of each
adapted module: a [depth, in, r], b [depth, r, out] and, of DoRA, magnitude [depth, out]. Modules
that are not stacked lack the depth axis; the patch embedder's a is [p, p, c, r]. So a @ b has the
kernel's shape in every case. The scale alpha / r is part of b, smaller ranks are padded with zeros,
and a layer without an adapter is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError


def modules(lora: Mapping, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """(path, {a, b[, magnitude]}) of every adapted module."""
    if "a" in lora:
        yield path, lora
        return
    for name, value in lora.items():
        yield from modules(value, (*path, name))


def combine(loras: Sequence[Mapping], weights: Sequence[float]) -> dict:
    """One adapter that changes the kernels by the weighted sum of several: their ranks add.

    Raises UserError for DoRA among several: its change of a kernel is not linear.
    """
    parts: dict[tuple[str, ...], list[dict]] = {}
    for lora, weight in zip(loras, weights, strict=True):
        for path, module in modules(lora):
            if "magnitude" in module and len(loras) > 1:
                raise UserError("a DoRA adapter cannot be added to others: use it alone")
            scaled = {**module, "b": np.float32(weight) * module["b"]}
            parts.setdefault(path, []).append(scaled)
    combined: dict = {}
    for path, found in parts.items():
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), path, combined)
        node |= found[0]
        if len(found) > 1:
            node["a"] = np.concatenate([module["a"] for module in found], -1)
            node["b"] = np.concatenate([module["b"] for module in found], -2)
    return combined


def merge(params: Mapping, lora: Mapping, weight: float = 1.0) -> dict:
    """Parameters with the adapter in their kernels: kernel + weight · a @ b in fp32, then in the
    kernel's dtype and sharding; of DoRA its columns at the length ``magnitude``.

    Other parameters are shared, and ``params`` stay as they are. One kernel is computed at a time,
    a stacked one layer by layer. Raises UserError for kernels of int8.
    """
    if "a" in lora:
        kernel = params["kernel"]
        if hasattr(kernel, "qvalue"):
            raise UserError("an adapter cannot be merged into int8 kernels: open the model in fp32")
        traced = isinstance(kernel, jax.core.Tracer)
        where = None if traced else getattr(kernel, "sharding", None)
        # of an array that is not on a mesh a stated sharding would be another type to jit
        merged = _merging(where if isinstance(where, jax.sharding.NamedSharding) else None)
        return {**params, "kernel": merged(kernel, dict(lora), np.float32(weight))}
    changed = {name: merge(params[name], inner, weight) for name, inner in lora.items()}
    return {**params, **changed}


@functools.lru_cache(maxsize=64)
def _merging(sharding):
    return jax.jit(_merged, out_shardings=sharding)


def _merged(kernel: jax.Array, module: Mapping, weight: jax.Array) -> jax.Array:
    def layer(inputs):
        kernel, module = inputs
        high = jax.lax.Precision.HIGHEST
        delta = jnp.tensordot(module["a"], module["b"], 1, precision=high)
        new = kernel.astype(jnp.float32) + weight * delta
        if "magnitude" in module:
            length = jnp.sqrt(jnp.square(new).sum(tuple(range(new.ndim - 1))))
            there = (module["magnitude"] != 0).any()
            new = jnp.where(there, new * (module["magnitude"] / jnp.maximum(length, 1e-30)), new)
        return new.astype(kernel.dtype)

    stacked = module["b"].ndim == 3
    return jax.lax.map(layer, (kernel, module)) if stacked else layer((kernel, module))

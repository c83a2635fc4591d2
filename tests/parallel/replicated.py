"""Which arrays every device of an fsdp mesh holds whole."""

from __future__ import annotations

import math

import jax
from jax.sharding import NamedSharding

from pixart_jax.parallel.rules import REPLICATED_LIMIT


def large_replicated(tree) -> list[str]:
    """Names of the replicated arrays, or shapes with shardings, over REPLICATED_LIMIT bytes."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or sharding.mesh.shape.get("fsdp", 1) == 1:
            continue
        large = math.prod(leaf.shape) * leaf.dtype.itemsize > REPLICATED_LIMIT
        if large and sharding.is_fully_replicated:
            found.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return found

"""One table from logical axis names to mesh axes, and the shardings that follow from it.

Parameters lie over fsdp along their input side and over tensor along heads and the MLP's inner width; batches lie over
data and fsdp together. A dimension that its mesh axis does not divide stays whole; a parameter that would thereby be
replicated, though large, is cut along its largest other dimension, so that memory a device falls with fsdp whatever the sizes are.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixart_jax.parallel import axes

# In order of preference: the first row whose mesh axis is still free for an array wins.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    (axes.BATCH, ("data", "fsdp")),
    (axes.TOKENS, "context"),
    (axes.ACT_EMBED, None),
    (axes.HEADS, "tensor"),
    (axes.MLP, "tensor"),
    (axes.TEXT, "fsdp"),
    (axes.EMBED, "fsdp"),
    (axes.VOCAB, "fsdp"),
    (axes.CONV_OUT, "fsdp"),
    (axes.CONV_IN, None),
    (axes.LAYERS, None),
    (axes.MODULATION, None),
    (axes.NORM, None),
)
ACTIVATION_RULES = tuple(row for row in RULES if row[0] in axes.ACTIVATION)  # for flax.linen.logical_axis_rules around a step
REPLICATED_LIMIT = 1 << 20  # bytes; above this no parameter may be a whole copy on each device when fsdp > 1

_PARAMETER_AXES = {name: target for name, target in RULES if isinstance(target, str)}


def parameter_spec(names: tuple[str | None, ...], shape: tuple[int, ...], itemsize: int, mesh: Mesh) -> PartitionSpec:
    """Where a parameter lies. names: one logical name (or None) a dimension, or () for none at all."""
    names = names or (None,) * len(shape)
    spec: list[str | None] = [None] * len(shape)
    for i, name in enumerate(names):
        axis = _PARAMETER_AXES.get(name)
        if axis and axis not in spec and mesh.shape[axis] > 1 and shape[i] % mesh.shape[axis] == 0:
            spec[i] = axis
    if mesh.shape["fsdp"] > 1 and "fsdp" not in spec and math.prod(shape) * itemsize > REPLICATED_LIMIT:
        free = [i for i in range(len(shape)) if spec[i] is None and names[i] != axes.LAYERS and shape[i] % mesh.shape["fsdp"] == 0]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def logical_names(boxed):
    """A tree of flax's boxed parameters → the same tree of tuples of logical names, () where an array has none."""
    return jax.tree.map(
        lambda leaf: tuple(leaf.names) if isinstance(leaf, nn.Partitioned) else (),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def unboxed(tree):
    """Flax's boxed parameters → plain arrays (or shapes). Unlike nn.unbox it constrains nothing: where they lie is this table's to say."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, nn.Partitioned) else leaf, tree, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )


def parameter_shardings(boxed_shapes, mesh: Mesh):
    """Boxed shapes (jax.eval_shape of a module's init) → NamedSharding for each parameter, in the unboxed tree."""
    names = logical_names(boxed_shapes)
    shapes = unboxed(boxed_shapes)
    return jax.tree.map(
        lambda shape, name: NamedSharding(mesh, parameter_spec(name, shape.shape, shape.dtype.itemsize, mesh)), shapes, names
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch's leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def large_replicated(tree, limit: int = REPLICATED_LIMIT) -> list[str]:
    """Names of the arrays (or shapes with shardings) over ``limit`` bytes that every device of an fsdp mesh holds whole; [] is right."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or sharding.mesh.shape.get("fsdp", 1) == 1:
            continue
        if math.prod(leaf.shape) * leaf.dtype.itemsize > limit and sharding.is_fully_replicated:
            found.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return found

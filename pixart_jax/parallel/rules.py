"""The table from logical axis names to mesh axes, and the shardings that follow from it.

Parameters are split over fsdp along their input side and over tensor along heads and the MLP's
inner width; batches over data and fsdp together. A dimension that its mesh axis does not divide
stays whole. A large parameter that would therefore be replicated is split along its largest other
dimension, so that memory per device falls with fsdp whatever the sizes are.
"""

from __future__ import annotations

import contextlib
import math

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixart_jax.errors import UserError
from pixart_jax.parallel import axes
from pixart_jax.parallel.mesh import batch_shards

# In order of preference: the first row whose mesh axis is still free for an array wins.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    (axes.BATCH, ("data", "fsdp")),
    (axes.TOKENS, "context"),
    (axes.TEXT_TOKENS, None),
    (axes.ACT_EMBED, None),
    (axes.ACT_HEADS, "tensor"),
    (axes.ACT_MLP, "tensor"),
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
# for flax.linen.logical_axis_rules around a step
ACTIVATION_RULES = tuple(row for row in RULES if row[0] in axes.OF_ACTIVATIONS)
# bytes; a larger parameter is not replicated when fsdp > 1
REPLICATED_LIMIT = 1 << 20

_REPLICATED = {axes.MODULATION, axes.NORM}
_SPLIT_OVER_FSDP = {name for name, target in RULES if target == "fsdp"}
_PARAMETER_AXES = {name: target for name, target in RULES if isinstance(target, str)}


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None, table=RULES):
    """Trace and call under this mesh and logical axis table; do nothing without a mesh."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(table):
        yield


def parameter_spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], itemsize: int, mesh: Mesh
) -> PartitionSpec:
    """The spec of a parameter. names: a logical name or None per dimension, or ()."""
    names = names or (None,) * len(shape)
    spec: list[str | None] = [None] * len(shape)
    for i, name in enumerate(names):
        axis = _PARAMETER_AXES.get(name or "")
        if axis and axis not in spec and mesh.shape[axis] > 1 and shape[i] % mesh.shape[axis] == 0:
            spec[i] = axis
    large, fsdp = math.prod(shape) * itemsize > REPLICATED_LIMIT, mesh.shape["fsdp"]
    if fsdp > 1 and "fsdp" not in spec and large:
        free = [i for i, name in enumerate(names) if spec[i] is None and name != axes.LAYERS]
        free = [i for i in free if shape[i] % fsdp == 0]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def logical_names(boxed):
    """The logical names of flax's boxed parameters, as the same tree of tuples; () for none."""
    return jax.tree.map(
        lambda leaf: tuple(leaf.names) if isinstance(leaf, nn.Partitioned) else (),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def unboxed(tree):
    """Flax's boxed parameters → plain arrays or shapes. Unlike nn.unbox, no constraints."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, nn.Partitioned) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def parameter_shardings(boxed_shapes, mesh: Mesh):
    """Each parameter's, in the unboxed tree. boxed_shapes: jax.eval_shape of a module's init."""
    names = logical_names(boxed_shapes)
    shapes = unboxed(boxed_shapes)
    return jax.tree.map(
        lambda shape, name: NamedSharding(
            mesh, parameter_spec(name, shape.shape, shape.dtype.itemsize, mesh)
        ),
        shapes,
        names,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """A batch's sharding where its shards divide so many rows, else replicated."""
    return batch_sharding(mesh) if rows % batch_shards(mesh) == 0 else replicated(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_sharded(boxed_shapes, mesh: Mesh) -> None:
    """Raise UserError where fsdp would leave over 2 % of a model's parameters, and over 1 MB in
    fp32, whole on every device because it divides none of their sides.

    boxed_shapes: jax.eval_shape of a module's init. Vectors, norms and modulation tables are
    replicated on purpose and not counted.
    """
    if mesh.shape["fsdp"] == 1:
        return
    total, whole = 0, {}
    leaves = jax.tree_util.tree_leaves_with_path(unboxed(boxed_shapes))
    names = jax.tree.leaves(logical_names(boxed_shapes), is_leaf=lambda x: isinstance(x, tuple))
    for (path, leaf), logical in zip(leaves, names, strict=True):
        total += leaf.size
        vector = leaf.ndim - (axes.LAYERS in logical) <= 1
        on_purpose = set(logical) & _REPLICATED and not set(logical) & _SPLIT_OVER_FSDP
        spec = parameter_spec(logical, leaf.shape, leaf.dtype.itemsize, mesh)
        if not ("fsdp" in spec or vector or on_purpose):
            whole[jax.tree_util.keystr(path, simple=True, separator="/")] = leaf
    amount = sum(leaf.size for leaf in whole.values())
    if amount > 0.02 * total and 4 * amount > REPLICATED_LIMIT:
        divisors = [n for n in range(1, mesh.size + 1) if mesh.size % n == 0]
        sides = [leaf.shape[-2:] for leaf in whole.values()]
        fits = [n for n in divisors if all(any(s % n == 0 for s in pair) for pair in sides)]
        raise UserError(
            f"mesh fsdp {mesh.shape['fsdp']} leaves {amount / total:.0%} of the parameters "
            f"({amount:,} of {total:,}) whole on every device: it divides no side of "
            f"{', '.join(list(whole)[:3])}{' …' if len(whole) > 3 else ''}; fsdp "
            f"{', '.join(map(str, fits))} would do"
        )

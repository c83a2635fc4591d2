"""One table from logical axis names to mesh axes, and the shardings that follow from it.

Parameters lie over fsdp along their input side and over tensor along heads and the MLP's inner
width; batches lie over data and fsdp together. A dimension that its mesh axis does not divide stays
whole; a parameter that would thereby be replicated, though large, is cut along its largest other
dimension, so that memory a device falls with fsdp whatever the sizes are.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
# bytes; above this no parameter may be a whole copy on each device when fsdp > 1
REPLICATED_LIMIT = 1 << 20

# of the parameters that may stay whole on an fsdp axis because a size happens not to divide
ACCIDENT_SHARE = 0.02

_KEPT_WHOLE = {axes.MODULATION, axes.NORM}
_CUT_OVER_FSDP = {name for name, target in RULES if target == "fsdp"}
_PARAMETER_AXES = {name: target for name, target in RULES if isinstance(target, str)}


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None, table=RULES):
    """Trace and call under this mesh and logical axis table; None: nothing is set."""
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nn.logical_axis_rules(table):
        yield


def parameter_spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], itemsize: int, mesh: Mesh
) -> PartitionSpec:
    """Where a parameter lies. names: one logical name (or None) a dimension, or () for none at
    all."""
    names = names or (None,) * len(shape)
    spec: list[str | None] = [None] * len(shape)
    for i, name in enumerate(names):
        axis = _PARAMETER_AXES.get(name)
        if axis and axis not in spec and mesh.shape[axis] > 1 and shape[i] % mesh.shape[axis] == 0:
            spec[i] = axis
    if (
        mesh.shape["fsdp"] > 1
        and "fsdp" not in spec
        and math.prod(shape) * itemsize > REPLICATED_LIMIT
    ):
        free = [
            i
            for i in range(len(shape))
            if spec[i] is None and names[i] != axes.LAYERS and shape[i] % mesh.shape["fsdp"] == 0
        ]
        if free:
            spec[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def logical_names(boxed):
    """A tree of flax's boxed parameters → the same tree of tuples of logical names, () where an
    array has none."""
    return jax.tree.map(
        lambda leaf: tuple(leaf.names) if isinstance(leaf, nn.Partitioned) else (),
        boxed,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def unboxed(tree):
    """Flax's boxed parameters → plain arrays (or shapes). Unlike nn.unbox it constrains nothing:
    where they lie is this table's to say."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, nn.Partitioned) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned),
    )


def parameter_shardings(boxed_shapes, mesh: Mesh):
    """Boxed shapes (jax.eval_shape of a module's init) → NamedSharding for each parameter, in the
    unboxed tree."""
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
    """A batch's leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Of an array of so many rows: as a batch where the mesh's parts divide them, else a whole copy
    on every device."""
    return batch_sharding(mesh) if rows % batch_shards(mesh) == 0 else replicated(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class ReplicationReport:
    """How much of a model every device of an fsdp mesh holds whole."""

    # parameter → elements, largest first: its axis is meant to be cut, and fsdp does not divide it
    by_accident: dict[str, int]
    on_purpose: int  # elements of vectors, norms and modulation tables, which the table keeps whole
    total: int  # elements of the model

    @property
    def share(self) -> float:
        """Of the parameters, by accident."""
        return sum(self.by_accident.values()) / max(1, self.total)


def replication_report(boxed_shapes, mesh: Mesh) -> ReplicationReport:
    """What the table leaves uncut over fsdp of a model (jax.eval_shape of its init, boxed); nothing
    where fsdp is 1."""
    accident, purpose, total = {}, 0, 0
    names = jax.tree.leaves(
        logical_names(boxed_shapes), is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    for (path, leaf), own in zip(
        jax.tree_util.tree_leaves_with_path(unboxed(boxed_shapes)), names, strict=True
    ):
        size = math.prod(leaf.shape)
        total += size
        if mesh.shape["fsdp"] == 1 or "fsdp" in parameter_spec(
            own, leaf.shape, leaf.dtype.itemsize, mesh
        ):
            continue
        vector = len(leaf.shape) - (axes.LAYERS in own) <= 1
        if vector or (set(own) & _KEPT_WHOLE and not set(own) & _CUT_OVER_FSDP):
            purpose += size
        else:
            accident[jax.tree_util.keystr(path, simple=True, separator="/")] = size
    return ReplicationReport(
        dict(sorted(accident.items(), key=lambda item: -item[1])), purpose, total
    )


def check_sharded(boxed_shapes, mesh: Mesh) -> ReplicationReport:
    """:func:`kept_whole`, or a UserError where over 2 % of the parameters stay whole by accident,
    and over 1 MB of them in fp32."""
    whole = replication_report(boxed_shapes, mesh)
    amount = sum(whole.by_accident.values())
    if whole.share <= ACCIDENT_SHARE or 4 * amount <= REPLICATED_LIMIT:
        return whole
    leaves = {
        jax.tree_util.keystr(p, simple=True, separator="/"): x
        for p, x in jax.tree_util.tree_leaves_with_path(unboxed(boxed_shapes))
    }
    sides = [leaves[name].shape for name in whole.by_accident]
    fits = [
        n
        for n in range(1, mesh.size + 1)
        if mesh.size % n == 0 and all(any(side % n == 0 for side in shape[-2:]) for shape in sides)
    ]
    first, more = list(whole.by_accident)[:3], len(whole.by_accident) - 3
    raise UserError(
        f"mesh fsdp {mesh.shape['fsdp']} leaves {whole.share:.0%} of the parameters ({amount:,} "
        f"of {whole.total:,}) whole on every device:"
        f" it divides no side of {', '.join(first)}{f' and {more} more' if more > 0 else ''}; "
        f"fsdp {', '.join(map(str, fits))} would do"
        f" (another {whole.on_purpose / whole.total:.1%}, vectors and tables, are whole on purpose)"
    )


def large_replicated(tree, limit: int = REPLICATED_LIMIT) -> list[str]:
    """Names of the arrays (or shapes with shardings) over ``limit`` bytes that every device of an
    fsdp mesh holds whole; [] is right."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sharding = leaf.sharding
        if not isinstance(sharding, NamedSharding) or sharding.mesh.shape.get("fsdp", 1) == 1:
            continue
        if math.prod(leaf.shape) * leaf.dtype.itemsize > limit and sharding.is_fully_replicated:
            found.append(jax.tree_util.keystr(path, simple=True, separator="/"))
    return found

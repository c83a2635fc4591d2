"""What a run carries from step to step: one pytree, created where it will lie on the mesh."""

from __future__ import annotations

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pixart_jax.parallel import gather, rules
from pixart_jax.training.bad_steps import StepGuard
from pixart_jax.training.ema import averaged


@flax.struct.dataclass
class TrainState:
    """step: int32 scalar, steps done in this stage, skipped ones too. params: fp32 masters.
    opt_state: Optax's, the EMA within.
    guard: what lets a bad step be told (training/bad_steps.py); None in a state that never
    steps."""

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState
    guard: StepGuard | None = None

    @property
    def average(self) -> optax.Params:
        """The EMA of the parameters, or the parameters where none is kept."""
        ema = averaged(self.opt_state)
        return self.params if ema is None else ema


def abstract_state(boxed_shapes, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shapes with shardings. boxed_shapes: jax.eval_shape of the module's init, with
    logical axis names.

    What the optimizer keeps for a parameter lies as the parameter does where it has its shape;
    factors and counters are small and replicated.
    """
    shardings = rules.parameter_shardings(boxed_shapes, mesh)
    params = rules.unboxed(boxed_shapes)
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    whole = rules.replicated(mesh)

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    shapes = jax.eval_shape(lambda p: _begin(p, optimizer), params)
    return jax.tree_util.tree_map_with_path(place, shapes)


def fresh_params(
    init: Callable[[jax.Array], optax.Params], key: jax.Array, abstract: TrainState
) -> optax.Params:
    """``init(key)``'s parameters (boxed or plain), made where they will lie: never whole on one
    device first."""
    return jax.jit(lambda k: rules.unboxed(init(k)), out_shardings=shardings_of(abstract.params))(
        key
    )


def state_from(
    params: optax.Params, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Step 0 from given parameters (numpy or jax arrays, anywhere); those that already lie right
    are taken over, not copied."""
    placed = jax.tree.map(gather.place_like, params, abstract.params)
    return jax.jit(
        lambda p: _begin(p, optimizer), out_shardings=shardings_of(abstract), donate_argnums=0
    )(placed)


def shardings_of(abstract):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _begin(params, optimizer) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), StepGuard.fresh())


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)

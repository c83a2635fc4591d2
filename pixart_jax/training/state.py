"""What a run carries from step to step: one pytree, created on the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from pixart_jax.parallel import gather, rules
from pixart_jax.training.bad_steps import StepGuard
from pixart_jax.training.optimizer import averaged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a stage. step: int32 scalar, steps done, skipped ones included. params: fp32
    masters. opt_state: Optax's, with the EMA. guard: which steps are skipped
    (training/bad_steps.py); None in a state that never steps."""

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState
    guard: StepGuard = None  # type: ignore[assignment]

    @property
    def average(self) -> optax.Params:
        """The EMA of the parameters, or the parameters where none is kept."""
        ema = averaged(self.opt_state)
        return self.params if ema is None else ema


def abstract_state(boxed_shapes, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shapes with shardings. boxed_shapes: jax.eval_shape of the module's init, with
    logical axis names.

    Optimizer state of a parameter's shape is sharded as the parameter; factors and counters are
    small and replicated.
    """
    shardings = rules.parameter_shardings(boxed_shapes, mesh)
    params = rules.unboxed(boxed_shapes)
    by_path = {
        _names(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }
    replicated = rules.replicated(mesh)

    def place(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            shape, sharding = by_path.get(names[start:], (None, None))
            if shape == leaf.shape:
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    shapes = jax.eval_shape(lambda p: _begin(p, optimizer), params)
    return jax.tree_util.tree_map_with_path(place, shapes)


def fresh_params(
    init: Callable[[jax.Array], optax.Params], key: jax.Array, abstract: TrainState
) -> optax.Params:
    """``init(key)``'s parameters (boxed or plain), created sharded: never whole on one device."""
    shardings = shardings_of(abstract.params)
    return jax.jit(lambda key: rules.unboxed(init(key)), out_shardings=shardings)(key)


def state_from(
    params: optax.Params, optimizer: optax.GradientTransformation, abstract: TrainState
) -> TrainState:
    """Step 0 from given parameters (numpy or jax arrays, anywhere); those already in place are
    donated, not copied."""
    placed = jax.tree.map(gather.place_like, params, abstract.params)
    begin = jax.jit(
        _begin, static_argnums=1, out_shardings=shardings_of(abstract), donate_argnums=0
    )
    return begin(placed, optimizer)


def shardings_of(abstract):
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def _begin(params, optimizer) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), StepGuard.fresh())


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)

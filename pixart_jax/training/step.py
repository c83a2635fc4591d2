"""One train step: a pure function (state, batch, key) → (state, metrics), compiled once a batch
shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixart_jax.parallel import rules
from pixart_jax.training.state import TrainState, shardings_of

Batch = dict[str, jax.Array]  # each [b, …]
# (params, batch, keys [b]) → {"loss": [b], …}
Losses = Callable[[Any, Batch, jax.Array], dict[str, jax.Array]]


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    losses: Losses,
    optimizer,
    rate,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    spike_factor: float | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Move the state one step, or, where loss or gradient are not finite or a spike
    (training/bad_steps.py), only its count.

    losses gives one value a sample, so that a batch's loss is the mean whatever the micro-batches;
    each sample has its own key, split from ``key`` by its place in the whole batch. With accumulate
    > 1 a scan adds up the gradients of that many micro-batches; the result is the whole batch's.
    Metrics are fp32 scalars: the means of what losses gives, lr, grad_norm, skipped (1 where the
    step was not taken) and skipped_in_row, how many have not been until now.
    """
    size = len(jax.tree.leaves(batch)[0])
    keys = jax.random.split(key, size)

    def mean_loss(params, batch, keys):
        terms = jax.tree.map(lambda x: jnp.mean(x, dtype=jnp.float32), losses(params, batch, keys))
        return terms["loss"], terms

    gradient = jax.grad(mean_loss, has_aux=True)
    if accumulate == 1:
        grads, terms = gradient(state.params, batch, keys)
    else:
        micro = jax.tree.map(lambda x: _split(x, accumulate, mesh), (batch, keys))

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(state.params, *part)), None

        shapes = jax.eval_shape(gradient, state.params, *jax.tree.map(lambda x: x[0], micro))
        total, _ = jax.lax.scan(
            add, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), micro
        )
        grads, terms = jax.tree.map(lambda x: x / accumulate, total)

    grad_norm = optax.global_norm(grads)
    ok, guard = state.guard.check(terms["loss"], grad_norm, spike_factor)

    def take(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params, grad_norm=grad_norm)
        return optax.apply_updates(params, updates), opt_state

    on_cpu = mesh is None or mesh.devices.flat[0].platform == "cpu"
    params, opt_state = update_where(ok, take, state.params, state.opt_state, grads, on_cpu=on_cpu)
    metrics = {
        **terms,
        # the optimizer counts the steps that it took
        "lr": jnp.asarray(rate(state.step - state.guard.skipped), jnp.float32),
        "grad_norm": grad_norm,
        "skipped": 1.0 - ok.astype(jnp.float32),
        "skipped_in_row": guard.consecutive.astype(jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, guard), metrics


class CompiledStep:
    """The step of a stage, compiled at its first call with a batch shape; its state is donated.

    Mesh and activation rules hold inside the call alone, so that nothing else is placed by them.
    """

    def __init__(
        self,
        losses: Losses,
        optimizer,
        rate,
        abstract: TrainState,
        mesh: Mesh,
        accumulate: int = 1,
        spike_factor: float | None = None,
    ):
        how = {
            "losses": losses,
            "optimizer": optimizer,
            "rate": rate,
            "accumulate": accumulate,
            "mesh": mesh,
            "spike_factor": spike_factor,
        }

        def step(state, batch, key):
            return train_step(state, batch, key, **how)

        whole = rules.replicated(mesh)
        self._mesh = mesh
        self.jitted = jax.jit(
            step,
            in_shardings=(shardings_of(abstract), rules.batch_sharding(mesh), whole),
            out_shardings=(shardings_of(abstract), whole),
            donate_argnums=0,
        )

    def __call__(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        with rules.on_mesh(self._mesh, rules.ACTIVATION_RULES):
            return self.jitted(state, batch, key)

    def trace(self, state: TrainState, batch: Batch, key) -> jax.stages.Traced:
        """The step traced for arrays of these shapes, as a call would trace it;
        ``.lower().compile()`` makes the executable."""
        with rules.on_mesh(self._mesh, rules.ACTIVATION_RULES):
            return self.jitted.trace(state, batch, key)

    @property
    def executables(self) -> int:
        """How many batch shapes have been compiled."""
        return self.jitted._cache_size()


def update_where(ok: jax.Array, take: Callable, params, opt_state, grads, *, on_cpu: bool):
    """take(params, opt_state, grads) where ok, else params and opt_state as they are, to the bit;
    donated, both stay where they lie.

    A selection is fused into the update on accelerators. XLA for CPUs would keep the new moments
    beside the selected ones, more than a copy of the parameters; there it is a loop of one turn or
    none, whose state is updated in place. A branch would do for CPUs, but XLA for GPUs copies all
    that a branch gives (9 GiB for XL/2), and the host must read ok before the device can go on.
    """
    if on_cpu:

        def turn(carried):
            _, params, opt_state = carried
            return (jnp.zeros((), bool), *take(params, opt_state, grads))

        return jax.lax.while_loop(lambda carried: carried[0], turn, (ok, params, opt_state))[1:]
    return jax.tree.map(
        lambda new, old: jnp.where(ok, new, old),
        take(params, opt_state, grads),
        (params, opt_state),
    )


def _split(x: jax.Array, parts: int, mesh: Mesh | None) -> jax.Array:
    """[b, …] → [parts, b / parts, …], each part strided over the batch so that every device keeps
    its own samples."""
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    if mesh is not None:
        x = jax.lax.with_sharding_constraint(
            x, NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
        )
    return x

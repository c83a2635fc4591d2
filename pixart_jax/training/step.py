"""The train step: loss, gradient, update and EMA as one pure function, compiled once a batch
shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pixart_jax.config import Config, StageConfig
from pixart_jax.parallel import rules
from pixart_jax.training.optimizer import schedule
from pixart_jax.training.stages import StageParts
from pixart_jax.training.state import TrainState, shardings_of
from pixart_jax.training.tasks import ConsistencyDistillation, Task

Batch = dict[str, jax.Array]  # each [b, …]


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    base: Any = None,
    *,
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    rate: Callable,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    spike_factor: float | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Take one step: (state, batch, key, base) → (state, metrics). base: parameters that the task
    reads and does not train, as those below an adapter; None: all are trained.

    A step whose loss or gradient is not finite, or a spike (bad_steps.py), changes the counters
    alone. ``accumulate``: micro-batches; their mean gradient is the whole batch's. Metrics are fp32
    scalars: the batch means of the task's losses, lr, grad_norm, skipped (1 for a step not taken)
    and skipped_in_row.
    """
    # each sample's key follows from its place in the whole batch, whatever the micro-batches
    keys = jax.random.split(key, len(jax.tree.leaves(batch)[0]))

    # what a student is to agree with: its own average, without gradient
    target = {"target": state.average} if isinstance(task, ConsistencyDistillation) else {}

    def loss_fn(params, batch, keys):
        losses = task.losses(params, batch, keys, base, **target)  # {"loss": [b], …}
        means = jax.tree.map(lambda x: jnp.mean(x, dtype=jnp.float32), losses)
        return means["loss"], means

    gradient = jax.grad(loss_fn, has_aux=True)
    if accumulate > 1:
        gradient = _accumulated(gradient, accumulate, mesh)
    grads, losses = gradient(state.params, batch, keys)
    grad_norm = optax.tree.norm(grads)

    def update(params, opt_state):
        # clip → AdamW or CAME → learning rate → EMA of the parameters after this update
        updates, opt_state = optimizer.update(grads, opt_state, params, grad_norm=grad_norm)
        return optax.apply_updates(params, updates), opt_state

    ok, guard = state.guard.check(losses["loss"], grad_norm, spike_factor)
    on_cpu = mesh is None or mesh.devices.flat[0].platform == "cpu"
    params, opt_state = update_where(ok, update, state.params, state.opt_state, on_cpu=on_cpu)
    metrics = {
        **losses,
        # the optimizer counts the steps that were taken
        "lr": jnp.asarray(rate(state.step - state.guard.skipped), jnp.float32),
        "grad_norm": grad_norm,
        "skipped": 1.0 - ok.astype(jnp.float32),
        "skipped_in_row": guard.consecutive.astype(jnp.float32),
    }
    return TrainState(state.step + 1, params, opt_state, guard), metrics


def _accumulated(gradient: Callable, parts: int, mesh: Mesh | None) -> Callable:
    """The mean over micro-batches of ``gradient``, one after the other in a scan."""

    def mean(params, batch, keys):
        micro = jax.tree.map(lambda x: _split(x, parts, mesh), (batch, keys))

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda x: x[0], micro))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, micro)
        return jax.tree.map(lambda x: x / parts, total)

    return mean


def _split(x: jax.Array, parts: int, mesh: Mesh | None) -> jax.Array:
    """[b, …] → [parts, b / parts, …], each part strided over the batch so that every device keeps
    its own samples."""
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
    return jax.lax.with_sharding_constraint(x, sharding)


def update_where(ok: jax.Array, update: Callable, params, opt_state, *, on_cpu: bool):
    """update(params, opt_state) where ok, else both unchanged to the bit; donated, both stay in
    place.

    On accelerators a selection, which XLA fuses into the update. XLA for CPUs would hold the new
    moments beside the selected ones, more than a copy of the parameters; there it is a loop of one
    turn or none, whose state is updated in place. A branch would do for CPUs, but XLA for GPUs
    copies all that a branch gives (9 GiB for XL/2), and the host must read ok before the device can
    continue.
    """
    if on_cpu:

        def turn(carry):
            _, params, opt_state = carry
            return (jnp.zeros((), bool), *update(params, opt_state))

        return jax.lax.while_loop(lambda carry: carry[0], turn, (ok, params, opt_state))[1:]
    old = (params, opt_state)
    return jax.tree.map(lambda new, old: jnp.where(ok, new, old), update(*old), old)


class CompiledStep:
    """``train_step`` jitted, compiled at its first call with a batch shape; the state is donated,
    the base never.

    Mesh and activation rules are set inside the call alone, so that they place nothing else.
    """

    def __init__(self, mesh: Mesh, abstract: TrainState, base: Any = None, **options: Any):
        def step(state, batch, key, base):
            return train_step(state, batch, key, base, mesh=mesh, **options)

        replicated, state = rules.replicated(mesh), shardings_of(abstract)
        self._mesh, self._base = mesh, base
        placed = state, rules.batch_sharding(mesh), replicated, shardings_of(base)
        self.jitted = jax.jit(
            step, in_shardings=placed, out_shardings=(state, replicated), donate_argnums=0
        )

    def __call__(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        with rules.on_mesh(self._mesh, rules.ACTIVATION_RULES):
            return self.jitted(state, batch, key, self._base)

    def trace(self, state: TrainState, batch: Batch, key) -> jax.stages.Traced:
        """The step traced for arrays of these shapes, as a call would trace it;
        ``.lower().compile()`` makes the executable."""
        with rules.on_mesh(self._mesh, rules.ACTIVATION_RULES):
            return self.jitted.trace(state, batch, key, self._base)

    @property
    def executables(self) -> int:
        """How many batch shapes have been compiled."""
        return self.jitted._cache_size()


def compiled_step(
    config: Config, stage: StageConfig, parts: StageParts, mesh: Mesh
) -> CompiledStep:
    """The step of a stage; nothing is compiled before its first call."""
    return CompiledStep(
        mesh,
        parts.abstract,
        parts.base,
        task=parts.task,
        optimizer=parts.optimizer,
        rate=schedule(stage.optimizer, stage.steps, stage.batch_size),
        accumulate=stage.optimizer.accumulate,
        spike_factor=config.guard.spike_factor,
    )

"""Checkpoints: Orbax, asynchronous, the state and the run's position in one commit, verified when
restored.

The two determine all that follows: random keys are derived from the config's seed and the step and
are not state; the loader's state is a number. A checkpoint is restored onto whatever mesh and
number of processes asks for it.

It carries a checksum of each array, computed on the device before writing, and one of the position:
any altered bit of either is found. What is missing or cut short, Orbax or TensorStore finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from pixart_jax.cli import as_line
from pixart_jax.config import Config
from pixart_jax.errors import Unavailable, UserError, one_line
from pixart_jax.files import Address, join, read_bytes
from pixart_jax.parallel import rules
from pixart_jax.training.bad_steps import StepGuard
from pixart_jax.training.bucket import MARK, Bucket, prepare_orbax
from pixart_jax.training.state import TrainState

POSITION_SUM = "position"  # the position's checksum among those of the arrays


@dataclasses.dataclass(frozen=True)
class RunPosition:
    """How far a run has come. step: steps done in this stage; total: in the whole run (names the
    checkpoint)."""

    stage: int = 0
    step: int = 0
    total: int = 0
    cost: dict = dataclasses.field(default_factory=dict)  # a stage's name → what the ledger counts
    window: dict = dataclasses.field(default_factory=dict)  # metrics not logged yet
    loader: dict = dataclasses.field(default_factory=dict)  # the loader's state
    guard: dict = dataclasses.field(default_factory=dict)  # TrainState.guard, added by save
    productive: float = 0.0  # seconds of stepping until here (metrics.StepTimer)
    ended: bool = False  # the stage, before its last step (EvaluateConfig.stop_below)


class Checkpointer:
    """The checkpoints of a run, under ``folder``. A context: leaving it waits for the last write.

    keep: how many of the newest stay. every: so does, for good, each at a multiple of so many total
    steps; None: no others. bucket: of a folder that lies in one; it commits with each checkpoint.
    """

    def __init__(
        self, folder: Address, keep: int, every: int | None = None, bucket: Bucket | None = None
    ):
        self.folder: Any = folder if bucket else Path(folder).absolute()
        self._saving = 0
        self._bucket = bucket
        _report_errors_once()
        policies = [preservation.LatestN(keep)]
        if every:
            policies.append(preservation.EveryNSteps(every))
        options: dict[str, Any]
        options = {"preservation_policy": preservation.AnyPreservationPolicy(policies)}
        if bucket:  # which deletes what is no longer kept
            options = {
                "async_options": ocp.AsyncOptions(
                    post_finalization_callback=lambda: bucket.commit(self._saving, keep, every)
                ),
                "atomicity_options": prepare_orbax(str(folder)),
            }
        self._manager = _Orbax(
            self.folder,
            item_names=("state", "place", "sums"),
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=bucket is None, enable_async_checkpointing=True, **options
            ),
        )
        if bucket:
            self.folder = self._manager.directory  # as Orbax makes it of an address

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_) -> None:
        with self._for_users():
            self._manager.close()

    def latest(self) -> int | None:
        """The total step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def latest_position(self) -> RunPosition:
        """The position of the newest checkpoint, or of the run's beginning."""
        latest = self.latest()
        return RunPosition() if latest is None else self.position(latest)

    def save(self, position: RunPosition, state: TrainState) -> None:
        """Begin to write a checkpoint; returns once the state is copied and may be donated."""
        self.wait()
        with self._for_users():
            self._saving = position.total
            if state.guard is not None:
                guard = {name: v.item() for name, v in jax.device_get(vars(state.guard)).items()}
                position = dataclasses.replace(position, guard=guard)
            arrays, place = _arrays(state), dataclasses.asdict(position)
            sums = _sums(arrays) | {POSITION_SUM: _json_sum(place)}
            items = {"place": ocp.args.JsonSave(place), "sums": ocp.args.JsonSave(sums)}
            items["state"] = ocp.args.StandardSave(arrays)
            self._manager.save(position.total, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Wait until the last checkpoint is committed. UserError where the disk was full."""
        with self._for_users():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raise the error of the last write, if it has ended and failed; never waits."""
        with self._for_users():
            # During a write Orbax's check can deadlock: it waits for the metadata writer, which
            # waits for the lock that the check holds.
            if not self._manager.is_saving_in_progress():
                self._manager.check_for_errors()

    @contextlib.contextmanager
    def _for_users(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # TensorStore raises a ValueError, Python's own files an OSError
            if self._bucket and not isinstance(error, TypeError | AttributeError | LookupError):
                if as_line(error):
                    raise
                raise Unavailable(
                    f"checkpoint {self._saving} of {self.folder} could not be written "
                    f"({one_line(error)}); the same command goes on from the last one"
                ) from error
            if "No space left on device" not in str(error):
                raise
            before = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
            last = f"step {max(before)} is the last" if before else "there is no"
            raise UserError(
                f"the disk is full: checkpoint {self._saving} of {self.folder} could not be "
                f"written, {last} save; free some space and run the same command again"
            ) from error

    def position(self, total: int) -> RunPosition:
        """The position of a checkpoint; UserError where it is damaged."""
        found = self._open(total, place=ocp.args.JsonRestore(), sums=ocp.args.JsonRestore())
        checksum = _json_sum(found.place)  # which older checkpoints lack
        if found.sums.get(POSITION_SUM, checksum) != checksum:
            raise self._damaged(total, "its position differs from what was saved")
        return RunPosition(**found.place)

    def restore(self, total: int, abstract: TrainState) -> TrainState:
        """The state of a checkpoint, laid out as ``abstract``.

        UserError where it is of another model, before an array of it is read, and where it is
        damaged; a damaged one is never skipped.
        """
        expected, position = _arrays(abstract), self.position(total)
        self._check_model(total, expected)
        items = {"state": ocp.args.StandardRestore(expected), "sums": ocp.args.JsonRestore()}
        opened = self._open(total, **items)
        found = _sums(opened.state)
        saved = {name: value for name, value in opened.sums.items() if name != POSITION_SUM}
        if wrong := sorted(name for name, _ in found.items() ^ saved.items()):
            count = len(set(wrong))
            what = f"{count} arrays differ from what was saved, the first is {wrong[0]}"
            raise self._damaged(total, what)
        guard = _guard(position.guard, abstract.guard)
        return TrainState(**opened.state, guard=guard)  # type: ignore[arg-type]

    def describe_latest(self, config: Config) -> str:
        """Where the last committed checkpoint is in the run, in words."""
        self.wait()
        position = self.latest_position()
        if not position.total:
            return "nothing was trained yet; the same command begins"
        stage = config.stages[position.stage]
        where = f"stage {stage.name}, step {position.step} of {stage.steps}"
        return f"{where} is saved; the same command goes on from there"

    def _check_model(self, total: int, expected: dict) -> None:
        """UserError where the checkpoint's arrays are not those of the run's model and
        optimizer."""
        handler = ocp.StandardCheckpointHandler()
        try:
            saved = handler.metadata(self.folder / str(total) / "state").tree
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own kinds
            raise self._damaged(total, error) from error
        theirs, ours = _shapes(saved), _shapes(expected)
        names = dict.fromkeys([*theirs, *ours])
        differing = [
            f"{name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
            for name in names
            if theirs.get(name) != ours.get(name)
        ]
        if differing:
            more = f" and {len(differing) - 2} more" if len(differing) > 2 else ""
            raise UserError(
                f"checkpoint {self.folder / str(total)} is of another model: "
                f"{'; '.join(differing[:2])}{more}; name another workdir"
            )

    def _open(self, total: int, **items) -> Any:
        try:
            return self._manager.restore(total, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax, TensorStore and JSON each raise their own kinds
            if self._bucket:  # Unavailable in an outage
                read_bytes(join(str(self.folder), str(total), MARK))
            raise self._damaged(total, error) from error

    def _damaged(self, total: int, why: object) -> UserError:
        before = [step for step in self._manager.all_steps() if step < total]
        why = " ".join(str(why).split())[:200]
        instead = f"the run goes on from step {max(before)}" if before else "the run starts anew"
        return UserError(
            f"checkpoint {self.folder / str(total)} is damaged ({why}); move it away and {instead}"
        )


def _report_errors_once() -> None:
    """Drop the tracebacks that threads of Orbax and asyncio print of errors that a save raises
    too, so that a full disk is one line."""
    logging.getLogger("absl").addFilter(lambda r: not (r.exc_info and "orbax" in r.pathname))
    full = "No space left on device"
    logging.getLogger("asyncio").addFilter(lambda r: not (r.exc_info and full in str(r.exc_info)))
    show = sys.unraisablehook
    if getattr(show, "func", None) is not _unraisable:
        sys.unraisablehook = functools.partial(_unraisable, show)


def _unraisable(show, error) -> None:
    # a write of TensorStore that fails after Orbax gave up on its checkpoint and closed its loop
    if not (error.exc_type is RuntimeError and str(error.exc_value) == "Event loop is closed"):
        show(error)


class _Orbax(ocp.CheckpointManager):
    """Orbax's manager, which asks JAX's preemption service nothing: the loop asks it, at each step
    (training/interruption.py).

    Orbax would ask once more for a checkpoint's step when it is committed, on a thread of its own,
    steps later. The service takes the step it was asked for last as a process's position, and could
    then name a stopping step that is already past.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def _arrays(state: TrainState) -> dict:
    """The part of the state that a checkpoint stores as arrays: all but the guard's few numbers."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _guard(numbers: dict, abstract: StepGuard | None) -> StepGuard | None:
    """The guard as it was saved, laid out as ``abstract``; a fresh one where none was."""
    if abstract is None:
        return None
    renamed = {"in_row": "consecutive", "good": "accepted"}  # names in older checkpoints
    numbers = {renamed.get(name, name): value for name, value in numbers.items()}

    def place(value, like):
        return jax.device_put(np.asarray(value, like.dtype), like.sharding)

    return jax.tree.map(place, StepGuard(**numbers) if numbers else StepGuard.fresh(), abstract)


def _by_name(tree) -> dict[str, Any]:
    """Leaves by path, 'params/blocks/…'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _shapes(tree) -> dict[str, str]:
    """Array name → its shape and dtype in words, without leaves that have none, as an empty part of
    the optimizer's state."""
    return {
        name: f"{list(leaf.shape)} {np.dtype(leaf.dtype).name}"
        for name, leaf in _by_name(tree).items()
        if hasattr(leaf, "shape")
    }


def _json_sum(value: dict) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _sums(tree) -> dict[str, int]:
    """A checksum of each array's bits, the same for every layout: Σ (2i + 1) · bits_i mod 2³²."""
    sharding = jax.tree.leaves(tree)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    sums = jax.device_get(_sum_program(mesh)(tree))
    return {name: int(value) for name, value in _by_name(sums).items()}


@functools.cache
def _sum_program(mesh):
    """The jitted checksums, replicated so that each process can read them."""
    options = {} if mesh is None else {"out_shardings": rules.replicated(mesh)}
    return jax.jit(lambda tree: jax.tree.map(_sum, tree), **options)


def _sum(x: jax.Array) -> jax.Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

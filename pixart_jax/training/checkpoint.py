"""Saves and restores: Orbax, asynchronous, state and place in the run together, and each save
checked when it is opened again.

Together they determine all that follows: random keys are derived from the config's seed and the
step and are not state; the loader's place is a number. A save is opened onto whatever mesh and
number of processes asks for it.

A save carries a list of its files, written just before Orbax commits it (renames it to its step),
and checksums of its arrays, taken on the device before it began. The first finds what is missing,
cut short or, in small files, altered, before Orbax reads anything; the second finds any altered bit
of the state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from orbax.checkpoint.checkpoint_managers import preservation_policy as keeping

from pixart_jax.errors import UserError
from pixart_jax.parallel import rules
from pixart_jax.training.bad_steps import StepGuard
from pixart_jax.training.state import TrainState

FILES = "files.json"  # in a save's folder: each file's size and, up to _SMALL bytes, CRC-32
_SMALL = 1 << 20
# Orbax writes these two after the list
_LATER = {FILES, "commit_success.txt", "_CHECKPOINT_METADATA"}


@dataclasses.dataclass(frozen=True)
class RunPosition:
    """Where in the run a save was made. step: done in this stage; total: done in the whole run
    (names the save)."""

    stage: int = 0
    step: int = 0
    total: int = 0
    cost: dict = dataclasses.field(default_factory=dict)  # a stage's name → what the ledger counts
    window: dict = dataclasses.field(default_factory=dict)  # metrics not logged yet
    loader: dict = dataclasses.field(default_factory=dict)  # the loader's state
    guard: dict = dataclasses.field(default_factory=dict)  # TrainState.guard, put here by save
    productive: float = 0.0  # seconds of stepping until here (training/clock.py)


class Checkpointer:
    """The saves of a run, under ``folder``. Use as a context: leaving it waits for the last save.

    keep: the newest so many stay. every: so does each at a multiple of so many total steps, for
    good; None: no others.
    """

    def __init__(self, folder: Path, keep: int, every: int | None = None):
        self.folder = Path(folder).absolute()
        self._saving: int | None = None
        logging.getLogger("absl").addFilter(_raised_anyway)
        logging.getLogger("asyncio").addFilter(_said_already)
        if getattr(sys.unraisablehook, "func", None) is not _late:
            sys.unraisablehook = functools.partial(_late, sys.unraisablehook)
        policies = [keeping.LatestN(keep)] + ([keeping.EveryNSteps(every)] if every else [])
        self._manager = _Orbax(
            self.folder,
            item_names=("state", "place", "sums"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keeping.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
            ),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        with self._space():
            self._manager.close()

    def latest(self) -> int | None:
        """The total step of the newest save, or None."""
        return self._manager.latest_step()

    def save(self, place: RunPosition, state: TrainState) -> None:
        """Begin a save; returns once the state is copied and may be donated."""
        self.wait()
        self._saving = place.total
        if state.guard is not None:
            numbers = {
                field.name: getattr(state.guard, field.name)
                for field in dataclasses.fields(StepGuard)
            }
            place = dataclasses.replace(
                place, guard={name: value.item() for name, value in jax.device_get(numbers).items()}
            )
        state = _arrays(state)
        self._manager.save(
            place.total,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                place=ocp.args.JsonSave(dataclasses.asdict(place)),
                sums=ocp.args.JsonSave(_sums(state)),
            ),
        )

    def wait(self) -> None:
        """Until the last save is committed. UserError where the disk was full."""
        with self._space():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises what the save under way has failed with, if it has; waits for nothing."""
        with self._space():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _space(self):
        """A full disk as one line that says what holds."""
        try:
            yield
        except Exception as fault:  # TensorStore gives a ValueError, Python's own files an OSError
            if "No space left on device" not in str(fault):
                raise
            before = [int(path.name) for path in self.folder.iterdir() if path.name.isdigit()]
            holds = (
                f"step {max(before)} is the last save" if before else "there is no save before it"
            )
            raise UserError(
                f"the disk is full: checkpoint {self._saving} of {self.folder} could not be "
                f"written, {holds}; "
                "free some space and run the same command again"
            ) from fault

    def place(self, total: int) -> RunPosition:
        return RunPosition(**self._open(total, place=ocp.args.JsonRestore()).place)

    def restore(self, total: int, abstract: TrainState) -> TrainState:
        """The state of a save, laid out as ``abstract``.

        UserError where it is of another model, before an array of it is read, and where it is
        damaged; none is ever skipped.
        """
        wanted = _arrays(abstract)
        self._check(total)
        self._compare(total, wanted)
        opened = self._open(
            total,
            state=ocp.args.StandardRestore(wanted),
            sums=ocp.args.JsonRestore(),
            place=ocp.args.JsonRestore(),
        )
        found = _sums(opened.state)
        wrong = sorted(
            name for name in found | opened.sums if found.get(name) != opened.sums.get(name)
        )
        if wrong:
            raise self._damaged(
                total, f"{len(wrong)} arrays differ from what was saved, the first is {wrong[0]}"
            )
        return TrainState(**opened.state, guard=_guard(opened.place.get("guard"), abstract.guard))

    def _compare(self, total: int, wanted: dict) -> None:
        """UserError where the save's arrays are not those that the run's model and optimizer
        have."""
        try:
            saved = (
                ocp.StandardCheckpointHandler().metadata(self.folder / str(total) / "state").tree
            )
        except Exception as fault:  # Orbax, TensorStore and JSON each raise their own kinds
            raise self._damaged(total, " ".join(str(fault).split())[:200]) from fault
        theirs, mine = _shapes(saved), _shapes(wanted)
        other = [
            name for name in dict.fromkeys([*theirs, *mine]) if theirs.get(name) != mine.get(name)
        ]
        if other:
            said = [
                f"{name} is {_shown(theirs.get(name))} there and {_shown(mine.get(name))} here"
                for name in other[:2]
            ]
            more = f" and {len(other) - 2} more" if len(other) > 2 else ""
            raise UserError(
                f"checkpoint {self.folder / str(total)} is of another model: "
                f"{'; '.join(said)}{more}; name another workdir"
            )

    def _list_files(self) -> None:
        """Called by Orbax when all of a save is written, before it gets its name."""
        if jax.process_index() == 0:
            (folder,) = self.folder.glob(f"{self._saving}.*tmp*")
            listed = {
                str(path.relative_to(folder)): _describe(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
            text = json.dumps(
                {name: found for name, found in listed.items() if name not in _LATER}, indent=0
            )
            (folder / FILES).write_text(text)

    def _check(self, total: int) -> None:
        """UserError where a file of the save is not as it was listed. Without the list what follows
        must do: Orbax, and the sums."""
        folder = self.folder / str(total)
        if not (folder / FILES).exists():
            return
        try:
            listed = json.loads((folder / FILES).read_text())
            for name, (size, crc) in listed.items():
                if not (folder / name).is_file():
                    raise self._damaged(total, f"{name} is missing")
                if [size, crc] != _describe(folder / name):
                    found = (folder / name).stat().st_size
                    raise self._damaged(
                        total,
                        f"{name} is altered"
                        if found == size
                        else f"{name} has {found} bytes of {size}",
                    )
        except (OSError, ValueError, TypeError, AttributeError):
            raise self._damaged(total, f"{FILES}, the list of its files, cannot be read") from None

    def _open(self, total: int, **items):
        self._check(total)
        try:
            return self._manager.restore(total, args=ocp.args.Composite(**items))
        except Exception as fault:  # Orbax, TensorStore and JSON each raise their own kinds
            raise self._damaged(total, " ".join(str(fault).split())[:200]) from fault

    def _damaged(self, total: int, why: str) -> UserError:
        before = [step for step in self._manager.all_steps() if step < total]
        instead = f"the run goes on from step {max(before)}" if before else "the run starts anew"
        return UserError(
            f"checkpoint {self.folder / str(total)} is damaged ({why}); move it away and {instead}"
        )


def _describe(path: Path) -> list[int | None]:
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= _SMALL else None]


class _Orbax(ocp.CheckpointManager):
    """Orbax's manager, which asks JAX's preemption service nothing: the loop asks it, at each step
    (training/interruption.py).

    Orbax would ask for the step of a save once more when it is committed, from a thread of its own,
    steps later. The service takes the step it was asked for last as where a process is, and could
    then name one for stopping that is already past.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


def _raised_anyway(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax's threads log of a fault that it then raises: it is to be
    said once."""
    return not (record.exc_info and "orbax" in record.pathname)


def _said_already(record: logging.LogRecord) -> bool:
    """Drops what asyncio logs of the other writes that a full disk has failed: the first is raised,
    and said by Checkpoints."""
    return not (record.exc_info and "No space left on device" in str(record.exc_info[1]))


def _late(usual, fault) -> None:
    """sys.unraisablehook without what a write of TensorStore's says that fails after Orbax gave up
    on its save and closed its loop."""
    if not (fault.exc_type is RuntimeError and str(fault.exc_value) == "Event loop is closed"):
        usual(fault)


def _arrays(state: TrainState) -> dict:
    """What of the state a save holds as arrays: all but the guard's few numbers."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _guard(numbers: dict | None, abstract: StepGuard | None) -> StepGuard | None:
    """The guard as it was saved, laid out as ``abstract``; a fresh one where the save is older than
    guards are."""
    if abstract is None:
        return None
    guard = StepGuard(**numbers) if numbers else StepGuard.fresh()
    return jax.tree.map(
        lambda value, like: jax.device_put(np.asarray(value, like.dtype), like.sharding),
        guard,
        abstract,
    )


def _shapes(tree) -> dict[str, tuple[tuple[int, ...], str]]:
    """Array name → (shape, dtype); what has no shape, as an empty part of the optimizer's state, is
    left out."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            tuple(leaf.shape),
            np.dtype(leaf.dtype).name,
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


def _shown(found) -> str:
    return "absent" if found is None else f"{list(found[0])} {found[1]}"


def _sums(tree) -> dict[str, int]:
    """A checksum of each array's bits, the same however the array is laid out: Σ (2i + 1) · bits_i
    mod 2³²."""
    sharding = jax.tree.leaves(tree)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    values = jax.device_get(_summing(mesh)(tree))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(v)
        for path, v in jax.tree_util.tree_leaves_with_path(values)
    }


@functools.cache
def _summing(mesh):
    """The program that sums; what it gives lies whole on every device, so that each process can
    read it."""
    where = {} if mesh is None else {"out_shardings": rules.replicated(mesh)}
    return jax.jit(lambda tree: jax.tree.map(_sum, tree), **where)


def _sum(x: jax.Array) -> jax.Array:
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

"""A run's folder or address in a bucket: one config, one writer at a time, and a cache of compiled
programs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import jax

from pixart_jax.config import Config
from pixart_jax.errors import UserError
from pixart_jax.files import (
    Address,
    cache_folder,
    hash64,
    is_remote,
    join,
    list_files,
    locked,
    write_json,
)
from pixart_jax.training.bucket import Bucket

# What may change between two calls: it affects what is logged, kept or where it is computed, not
# what is learned.
MUTABLE_FIELDS = {
    *("log_every", "wandb", "checkpoint_every", "keep_checkpoints", "keep_every", "preview"),
    *("bad_steps_in_row", "profile", "hardware", "mesh", "remat", "workers", "strict", "evaluate"),
}


class Workdir:
    """The workdir ``address`` of a run of ``config``; a context that holds its lock.

    Entering raises UserError when it holds a run of another config (naming the difference) or
    another process is writing there; :meth:`save_config` stores the config, once the run is known
    to begin.

    path: the folder itself; for a bucket, the local one whose files ``bucket`` copies there:
    ``scratch``, else one in the cache. checkpoints: written to the bucket directly.
    """

    def __init__(self, address: Address, config: Config, scratch: str | None = None):
        self.bucket: Bucket | None = None
        if is_remote(address):
            self.name = str(address).rstrip("/")
            folder = Path(scratch or cache_folder() / "runs" / f"{hash64(self.name):016x}")
            self.path = folder.absolute() / f"process-{jax.process_index()}"
            self.bucket = Bucket(self.name, self.path)
            self.checkpoints = join(self.name, "checkpoints")
        else:
            self.path = Path(address).absolute()
            self.name, self.checkpoints = str(self.path), self.path / "checkpoints"
        self.config, self.samples = config, self.path / "samples"
        self.model, self.adapter = self.path / "model", self.path / "adapter"
        self.programs, self.profile = self.path / "compilation_cache", self.path / "profile"
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Workdir:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"workdir {self.path} is a file: name a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if self.bucket:
                stack.enter_context(self.bucket)
            elif jax.process_index() == 0:
                busy = UserError(
                    f"workdir {self.path} is in use by another run: wait for it, or name another "
                    "folder"
                )
                stack.enter_context(locked(self.path / ".lock", busy=busy))
            self._compare()
            self.samples.mkdir(exist_ok=True)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def _compare(self) -> None:
        """UserError where config.json is of another run."""
        file, ours = self.path / "config.json", as_json(self.config)
        if file.exists():
            try:
                theirs = json.loads(file.read_text())
            except ValueError:
                raise UserError(
                    f"{file} is damaged: move it away if the workdir is this config's"
                ) from None
            differing = config_diff(with_defaults(theirs, self.config), ours)
            if differing:
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                raise UserError(
                    f"workdir {self.name} holds another config: {'; '.join(differing[:3])}{more}; "
                    "name another folder"
                )
        elif list_files(self.checkpoints) if self.bucket else self.checkpoints.exists():
            raise UserError(
                f"workdir {self.name} holds checkpoints but no config.json: name another folder"
            )

    def save_config(self) -> None:
        """Write the resolved config to config.json: from now on the folder is this run's."""
        if jax.process_index() == 0:
            write_json(self.path / "config.json", as_json(self.config), indent=1)
        self.copy()

    def copy(self) -> None:
        """Copy what has changed to the bucket, if the run lies in one."""
        if self.bucket and jax.process_index() == 0:
            self.bucket.copy()


def as_json(value):
    """A config, or a value of its fields, as read back from JSON."""
    is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return json.loads(json.dumps(dataclasses.asdict(value) if is_config else value))


def enable_compilation_cache(folder: Path) -> None:
    """Cache compiled programs in ``folder``, unless JAX has another cache. Call it before the first
    compilation."""
    # set by the program or by JAX_COMPILATION_CACHE_DIR
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # a start compiles many small programs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def with_defaults(stored, config):
    """A stored config as JSON, completed by the defaults of fields that its version of the program
    did not have. config: the dataclass to compare it with, which has all fields."""
    if isinstance(stored, list) and isinstance(config, tuple):
        return [*(with_defaults(a, b) for a, b in zip(stored, config)), *stored[len(config) :]]
    if not (isinstance(stored, dict) and dataclasses.is_dataclass(config)):
        return stored
    completed = dict(stored)
    for field in dataclasses.fields(config):
        if field.name in stored:
            completed[field.name] = with_defaults(stored[field.name], getattr(config, field.name))
        elif field.default is not dataclasses.MISSING:
            completed[field.name] = as_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            completed[field.name] = as_json(field.default_factory())
    return completed


def config_diff(old: dict, new: dict) -> list[str]:
    """'stages.0.steps was 10, now 20' for each value that determines the result and differs."""
    before, after = _leaves(old), _leaves(new)
    return [
        f"{path} was {before.get(path, 'absent')}, now {after.get(path, 'absent')}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path) and not set(path.split(".")) & MUTABLE_FIELDS
    ]


def _leaves(value: dict) -> dict[str, str]:
    """Path 'stages.0.steps' → JSON of every plain value and every empty list or object."""

    def is_leaf(node) -> bool:
        return node is None or node == [] or node == {}

    leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=is_leaf)
    keystr = jax.tree_util.keystr
    return {keystr(path, simple=True, separator="."): json.dumps(v) for path, v in leaves}

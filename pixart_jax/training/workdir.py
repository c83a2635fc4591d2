"""A run's folder: one config, one writer at a time, and a place for compiled programs."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path

import jax

from pixart_jax.config import Config
from pixart_jax.errors import UserError

# What may change between two calls: it changes what is shown, kept or where it is computed, not
# what is learned.
MUTABLE_FIELDS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "keep_every",
    "bad_steps_in_row",
    "profile",
    "preview",
    "hardware",
    "mesh",
    "remat",
    "workers",
    "strict",
)


class Workdir:
    """The folder ``path`` for a run of ``config``; a context that holds its lock.

    Entering raises UserError when the folder holds a run of another config (says what differs) or
    another process is writing there; :meth:`keep` writes the config down, once it is known that the
    run can begin.
    """

    def __init__(self, path: str | os.PathLike, config: Config):
        self.path, self.config = Path(path).absolute(), config
        self.checkpoints, self.samples = self.path / "checkpoints", self.path / "samples"
        self.model = self.path / "model"
        self.programs, self.profile = self.path / "compilation_cache", self.path / "profile"

    def __enter__(self) -> Workdir:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"workdir {self.path} is a file: name a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / ".lock", "a") if jax.process_index() == 0 else None
        if self._lock:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"workdir {self.path} is in use by another run: wait for it, or name another "
                    "folder"
                ) from None
        self._compare()
        self.samples.mkdir(exist_ok=True)
        return self

    def __exit__(self, *_):
        if self._lock:
            self._lock.close()

    def _compare(self) -> None:
        file, mine = self.path / "config.json", as_json(self.config)
        if file.exists():
            try:
                theirs = json.loads(file.read_text())
            except ValueError:
                raise UserError(
                    f"{file} is damaged: move it away if the workdir is this config's"
                ) from None
            differing = config_diff(with_defaults(theirs, self.config), mine)
            if differing:
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                raise UserError(
                    f"workdir {self.path} holds another config: {'; '.join(differing[:3])}{more}; "
                    "name another folder"
                )
        elif self.checkpoints.exists():
            raise UserError(
                f"workdir {self.path} holds checkpoints but no config.json: name another folder"
            )

    def save_config(self) -> None:
        """The resolved config → config.json: from now on the folder is this run's."""
        if jax.process_index() == 0:
            write_atomic(
                self.path / "config.json", json.dumps(as_json(self.config), indent=1) + "\n"
            )


def as_json(config: Config) -> dict:
    """The resolved config as plain JSON values."""
    return _plain(config)


def _plain(value):
    """Dataclasses, tuples and plain values → what JSON gives back of them."""
    return json.loads(
        json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value)
    )


def enable_compilation_cache(folder: Path) -> None:
    """Compiled programs are kept in ``folder`` and read from there by the next start, unless JAX
    has been given another place for them.

    To be called before the first compilation.
    """
    # set by the program or by JAX_COMPILATION_CACHE_DIR
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # a start is made of many small programs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def with_defaults(stored, config):
    """A stored config as JSON, completed by the defaults of the fields that its version of the
    program did not know.

    config: the dataclass that it is to be compared with, which says what fields there are.
    """
    if isinstance(stored, list) and isinstance(config, tuple):
        return [*(with_defaults(a, b) for a, b in zip(stored, config)), *stored[len(config) :]]
    if not (isinstance(stored, dict) and dataclasses.is_dataclass(config)):
        return stored
    completed = dict(stored)
    for field in dataclasses.fields(config):
        if field.name in stored:
            completed[field.name] = with_defaults(stored[field.name], getattr(config, field.name))
        elif field.default is not dataclasses.MISSING:
            completed[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            completed[field.name] = _plain(field.default_factory())
    return completed


def config_diff(old: dict, new: dict) -> list[str]:
    """'stages.0.steps was 10, now 20' for each value that determines the result and differs."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    absent = object()
    return [
        f"{path} was {_show(before.get(path, absent), absent)}, now "
        f"{_show(after.get(path, absent), absent)}"
        for path in dict.fromkeys([*before, *after])
        if before.get(path, absent) != after.get(path, absent)
        and not set(path.split(".")) & set(MUTABLE_FIELDS)
    ]


def write_atomic(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _leaves(value, path=""):
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if items is None or not value:
        yield path, value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))


def _show(value, absent) -> str:
    return "absent" if value is absent else json.dumps(value)

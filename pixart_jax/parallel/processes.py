"""The processes of one run: JAX's multi-process runtime, started from flags, from the environment
or as JAX detects the cluster.

    options, rest = pop_distributed_flags(argv)
    initialize(options)               # before anything touches a device
    sys.exit(run_with_peers(main))    # main() → exit status; never waits for a lost peer

liveness.py watches the peers from then on (exit status PEER_LOST).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from pixart_jax.errors import UserError
from pixart_jax.files import Address, delete, exists, is_remote, join, put
from pixart_jax.parallel import DISTRIBUTED_ENV_VARS, liveness
from pixart_jax.parallel.liveness import PEER_LOST as PEER_LOST
from pixart_jax.parallel.liveness import run_with_peers as run_with_peers


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


# flag: (type, metavar, help)
_FLAGS: dict[str, tuple[Callable, str, str]] = {
    "coordinator": (str, "HOST:PORT", "where process 0 listens; with the next two"),
    "processes": (int, "N", "number of processes"),
    "process-index": (int, "K", "index of this process, from 0"),
    "distributed": (str, "auto|none", "none: one process alone, whatever cluster JAX detects"),
    "start-timeout": (float, "SECONDS", "until all processes must have connected (300)"),
    "peer-timeout": (float, "SECONDS", "silence after which a process counts as lost (60)"),
    "stall-timeout": (float, "SECONDS", "without any step, then the run ends (1800; 0: never)"),
}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("several processes (docs/pods.md)")
    for name, (kind, metavar, text) in _FLAGS.items():
        names = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
        group.add_argument(*names, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS)
    return parser


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """How the processes of a run find each other; timeouts in seconds."""

    coordinator: str | None = None
    processes: int | None = None
    process_index: int | None = None
    distributed: str = "auto"
    start_timeout: float = 300
    peer_timeout: float = 60
    stall_timeout: float = 1800

    def __post_init__(self) -> None:
        if error := self._error():
            raise UserError(error)

    def _error(self) -> str | None:
        if self.distributed not in ("auto", "none"):
            return f"--distributed {self.distributed!r}: auto or none"
        for name, least in (("start", 1), ("peer", 1), ("stall", 0)):
            if not (seconds := getattr(self, f"{name}_timeout")) >= least:
                return f"--{name}-timeout {seconds:g}: at least {least} second"
        where, count, index = self.coordinator, self.processes, self.process_index
        if (where, count, index) == (None, None, None):
            return None
        if where is None or count is None or index is None:
            return "--coordinator, --processes and --process-index: give all three, or none"
        host, _, port = where.rpartition(":")
        if not (host and port.isdigit() and 0 < int(port) < 65536):
            return f"--coordinator {where!r}: HOST:PORT is needed"
        if count < 1:
            return f"--processes {count}: at least 1"
        if not 0 <= index < count:
            return f"--process-index {index}: the indices are 0 to {count - 1}"
        if self.distributed == "none":
            return "--distributed none with --coordinator: one or several?"
        return None


def pop_distributed_flags(
    argv: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[DistributedOptions, list[str]]:
    """(the options of a command line and the environment, the remaining arguments). The command
    line wins; the environment variables count only where all three are set."""
    environment = os.environ if environment is None else environment
    found, rest = _parser().parse_known_args(list(argv))
    values = vars(found)
    place = ("--coordinator", "--processes", "--process-index")
    given = [environment.get(name, "") for name in DISTRIBUTED_ENV_VARS]
    flagged = {"coordinator", "processes", "process_index"} & set(values)
    if all(given) and not flagged and values.get("distributed") != "none":
        flags = [word for pair in zip(place, given, strict=True) for word in pair]
        values |= vars(_parser().parse_args(flags))
    return DistributedOptions(**values), rest


def usage() -> str:
    """The flags, for a program's --help."""
    return _parser().format_help().strip()


def initialize(options: DistributedOptions) -> None:
    """Join the other processes; return when all have connected, at once where this is the only one.

    Call it before anything asks JAX for a device. Raises UserError where a detected cluster cannot
    be joined; a coordinator that is not reached in time ends this process with one line and status
    2.
    """
    if jax.distributed.is_initialized() or options.distributed == "none":
        return
    where: dict = {}
    if options.coordinator is not None:
        if options.processes == 1:
            return
        where = {
            "coordinator_address": options.coordinator,
            "num_processes": options.processes,
            "process_id": options.process_index,
            "cluster_detection_method": "deactivate",
        }
    if jax.config.jax_cpu_collectives_implementation in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    liveness.handle_sigabrt(lambda: _start_error(options), status=2)
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=int(options.start_timeout),
            # JAX's own detection comes after liveness.py's
            heartbeat_timeout_seconds=int(max(100, 2 * options.peer_timeout)),
        )
    except (ValueError, RuntimeError, TypeError) as error:
        liveness.handle_sigabrt(None)
        line = " ".join(str(error).split())[:200]
        if not where and "coordinator_address should be defined" in line:
            return  # no cluster
        if not where and "before any JAX calls" in line and not _in_cluster():
            return  # called from a process that already computes, and no cluster either
        raise UserError(
            f"cannot join the other processes ({line}); give --coordinator HOST:PORT --processes N "
            "--process-index K, or --distributed none for this one alone"
        ) from None
    liveness.start_monitor(options.peer_timeout, options.stall_timeout)


def _start_error(options: DistributedOptions) -> str:
    many = f"not all of the {options.processes} processes have come to"
    what = f"no coordinator at {options.coordinator}, or {many} it"
    if options.coordinator is None:
        what = "not all processes of the detected cluster have come"
    elif options.process_index == 0:
        what = f"{many} {options.coordinator}"
    limit = f"within {options.start_timeout:g} s (--start-timeout)"
    return f"{what} {limit}; --distributed none runs this process alone"


def _in_cluster() -> bool:
    """Whether jax.distributed.initialize would detect a cluster; it has no public function."""
    from jax._src.clusters import ClusterEnv

    return any(
        not kind.opt_in_only_method and kind.is_env_present() for kind in ClusterEnv._cluster_types
    )


def assert_same_config(command: str, folder: Address | None = None, patience: float = 60) -> None:
    """Check that all processes run the same ``command`` (a text of all that determines the run) and
    see the same ``folder``, within ``patience`` seconds, as a network disk may show a file late.

    Raises UserError on a process that differs from process 0.
    """
    if jax.process_count() == 1:
        return
    index = jax.process_index()
    digest, token = hashlib.sha256(command.encode()).digest(), os.urandom(8)
    if index == 0 and folder is not None:
        if not is_remote(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        put(join(folder, f".seen-by-all-{token.hex()}"), b"")
    mine = np.frombuffer(digest + token, np.uint8)
    theirs = np.asarray(multihost_utils.broadcast_one_to_all(mine)).astype(np.uint8).tobytes()
    if theirs[:32] != digest:
        raise UserError(f"process {index} was started with another config than process 0")
    if folder is None:
        return
    mark = join(folder, f".seen-by-all-{theirs[32:].hex()}")
    deadline = time.monotonic() + patience
    while not exists(mark):
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} is not shared: process {index} does not see process 0's file"
            )
        time.sleep(0.2)
    liveness.barrier("folder")
    if index == 0:
        delete(mark)


def warm_up_collectives(mesh: jax.sharding.Mesh) -> None:
    """Open the connections between the processes of a CPU mesh; nothing on other platforms.

    Gloo opens those of a group of devices at the group's first collective and gives up after 30 s,
    which is too short where one process compiles a step for longer than another.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    groups = [g for n in range(1, len(names) + 1) for g in itertools.combinations(names, n)]
    spec = PartitionSpec(mesh.axis_names)

    @jax.shard_map(mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    def sums(x: jax.Array) -> jax.Array:
        for group in groups:
            x = x + jax.lax.psum(x, group)
        return x

    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, spec), lambda _: np.ones(1, np.float32)
    )
    compiled = jax.jit(sums).lower(ones).compile()
    liveness.barrier("warm-up")
    compiled(ones).block_until_ready()

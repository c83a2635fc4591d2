"""The processes of one run: how JAX's multi-process runtime is started, by flags, by the
environment or as JAX detects the cluster.

    options, rest = split(argv)      # takes the flags of FLAGS out of a command line start(options)
    # before any device is touched; one process alone where nothing says otherwise
    sys.exit(conclude(run))          # run() → exit status, told to the other processes; a lost one
    is never waited for

Peers are watched from the start on (liveness.py): one that is dead or hung ends the others with a
line and status PEER_LOST.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pixart_jax.errors import UserError, nearest
from pixart_jax.parallel import DISTRIBUTED_ENV_VARS, liveness
from pixart_jax.parallel.liveness import PEER_LOST as PEER_LOST

FLAGS = {
    "--coordinator": ("HOST:PORT", "where process 0 listens; with --processes and --process-index"),
    "--processes": ("N", "how many processes there are"),
    "--process-index": ("K", "which one this is, from 0"),
    "--distributed": (
        "auto|none",
        "none: one process alone, whatever JAX would detect (Cloud TPU, GKE, SLURM, Open MPI)",
    ),
    "--start-timeout": ("SECONDS", "until all processes must have come (300)"),
    "--peer-timeout": (
        "SECONDS",
        "without a sign of life after which a process counts as lost (60)",
    ),
    "--stall-timeout": (
        "SECONDS",
        "without a step on any process after which the run is ended (1800; 0: never)",
    ),
}


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """How the processes of a run find each other. Raises UserError for what cannot be meant."""

    coordinator: str | None = None
    processes: int | None = None
    process_index: int | None = None
    distributed: str = "auto"
    start_timeout: float = 300
    peer_timeout: float = 60
    stall_timeout: float = 1800

    def __post_init__(self):
        if self.distributed not in ("auto", "none"):
            raise UserError(
                f"--distributed {self.distributed!r}{nearest(self.distributed, ('auto', 'none'))}"
            )
        given = {
            "--coordinator": self.coordinator,
            "--processes": self.processes,
            "--process-index": self.process_index,
        }
        missing = [flag for flag, value in given.items() if value is None]
        if missing and len(missing) < 3:
            said = ", ".join(flag for flag in given if flag not in missing)
            raise UserError(
                f"{said} without {', '.join(missing)}: give all three, or none where JAX detects "
                "the cluster"
            )
        if not missing:
            _address(self.coordinator)
            if self.processes < 1:
                raise UserError(f"--processes {self.processes}: at least 1")
            if not 0 <= self.process_index < self.processes:
                raise UserError(
                    f"--process-index {self.process_index} of --processes {self.processes}: the "
                    f"indices are 0 to {self.processes - 1}"
                )
            if self.distributed == "none":
                raise UserError(
                    "--distributed none together with --coordinator: one process alone, or several?"
                )
        for flag, seconds in (("start", self.start_timeout), ("peer", self.peer_timeout)):
            if seconds < 1:
                raise UserError(f"--{flag}-timeout {seconds:g}: at least 1 second")
        if self.stall_timeout < 0:
            raise UserError(f"--stall-timeout {self.stall_timeout:g}: seconds, or 0 for never")


def pop_distributed_flags(
    argv: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[DistributedOptions, list[str]]:
    """(the options of a command line and the environment, the arguments that are left). The command
    line wins."""
    environment = os.environ if environment is None else environment
    given: dict[str, str] = {}
    if all(environment.get(name) for name in DISTRIBUTED_ENV_VARS):
        given = dict(
            zip(
                ("coordinator", "processes", "process_index"),
                (environment[name] for name in DISTRIBUTED_ENV_VARS),
                strict=True,
            )
        )
    rest, argv, flagged = [], list(argv), {}
    while argv:
        token = argv.pop(0)
        flag, equals, value = token.partition("=")
        flag = flag.replace("_", "-")
        if flag not in FLAGS:
            rest.append(token)
            continue
        if not equals:
            if not argv or argv[0].startswith("--"):
                raise UserError(f"{flag} needs {FLAGS[flag][0]}")
            value = argv.pop(0)
        flagged[flag[2:].replace("-", "_")] = value
    if {"coordinator", "processes", "process_index"} & set(flagged) or flagged.get(
        "distributed"
    ) == "none":
        given = {}
    return DistributedOptions(
        **{name: _typed(name, value) for name, value in (given | flagged).items()}
    ), rest


def usage() -> str:
    """The flags, for a program's --help."""
    lines = [f"  {f'{flag} {value}':28} {what}" for flag, (value, what) in FLAGS.items()]
    return "\n".join(["Several processes (docs/pods.md):", *lines])


def initialize(options: DistributedOptions) -> None:
    """Join the other processes; returns when all have come. Nothing, and no delay, where there is
    but this one.

    Must come before anything asks JAX for a device. Raises UserError where a cluster is detected
    that cannot be joined; a coordinator that is not reached in time ends this process with one line
    and status 2.
    """
    if jax.distributed.is_initialized() or options.distributed == "none":
        return
    where = {}
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
    liveness.handle_sigabrt(_late(options))
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=int(options.start_timeout),
            # our own watch speaks first
            heartbeat_timeout_seconds=int(max(100, 2 * options.peer_timeout)),
        )
    except (ValueError, RuntimeError, TypeError) as fault:
        liveness.handle_sigabrt(None)
        line = " ".join(str(fault).split())[:200]
        if not where and "coordinator_address should be defined" in line:
            return  # no cluster: this process alone
        if not where and "before any JAX calls" in line and not _in_cluster():
            # a program called from another, in a process that computes already: there is nothing to
            # join
            return
        raise UserError(
            f"cannot join the other processes ({line}); say --coordinator HOST:PORT --processes N "
            "--process-index K, "
            "or --distributed none for this one alone"
        ) from None
    liveness.start_monitor(options.peer_timeout, options.stall_timeout)


def assert_same_config(
    command: str, folder: str | os.PathLike | None = None, patience: float = 60
) -> None:
    """That all processes mean the same: command (whatever determines the run, as text) and folder,
    which all must see.

    patience: seconds, for a network disk may show a new file late.

    Raises UserError on the process that differs from process 0; nothing where there is one process
    alone.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(command.encode()).hexdigest()
    mark = ""
    if jax.process_index() == 0 and folder is not None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        mark = f".seen-by-all-{os.urandom(8).hex()}"
        (folder / mark).touch()
    told, mark = liveness.broadcast_string("agree", f"{digest} {mark}").split(" ")
    if told != digest:
        raise UserError(
            f"process {jax.process_index()} was started with another config than process 0: give "
            "all the same command"
        )
    if folder is not None:
        deadline = time.monotonic() + patience
        while not (Path(folder) / mark).exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder} is not one folder that all processes see (process "
                    f"{jax.process_index()} does not see what process 0 "
                    "wrote there): name one on a shared disk"
                )
            time.sleep(0.2)
        liveness.barrier("agree")
        if jax.process_index() == 0:
            (Path(folder) / mark).unlink(missing_ok=True)


def warm_up_collectives(mesh: jax.sharding.Mesh) -> None:
    """Let the processes of a CPU mesh open their connections now, while all are here; nothing on
    other platforms.

    Gloo opens those of a group of devices at the group's first collective, and gives up where the
    others are 30 s late: as they are when one process compiles a step longer than another.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    names = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    groups = [
        group
        for count in range(1, len(names) + 1)
        for group in itertools.combinations(names, count)
    ]
    spec = PartitionSpec(mesh.axis_names)

    def sums(x: jax.Array) -> jax.Array:
        for group in groups:
            x = x + jax.lax.psum(x, group)
        return x

    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, spec), lambda _: np.ones(1, np.float32)
    )
    add = (
        jax.jit(jax.shard_map(sums, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        .lower(ones)
        .compile()
    )
    liveness.barrier("acquaint")
    add(ones).block_until_ready()


def run_with_peers(run: Callable[[], int]) -> int:
    """run()'s exit status, made known to the other processes.

    Where all end well they end together. Where this one does not, the others learn of it at once,
    and nobody waits for a peer
    that will not come: the process then ends here, its traceback printed where a fault of the
    program is the cause.
    """
    try:
        status = run()
    except BaseException as fault:
        if not liveness.has_peers():
            raise
        # a broken collective is a symptom; the cause is the peer
        if (lost := liveness.diagnose_peer_failure(fault)) is not None:
            print(f"error: {lost}", file=sys.stderr, flush=True)
            status = PEER_LOST
        else:
            traceback.print_exc()
            status = 1
    return liveness.shut_down(status)


def _in_cluster() -> bool:
    """Whether JAX would detect a cluster around this process."""
    # what jax.distributed.initialize asks; it has no public name
    from jax._src.clusters import ClusterEnv

    return any(
        not kind.opt_in_only_method and kind.is_env_present() for kind in ClusterEnv._cluster_types
    )


def _late(options: DistributedOptions) -> str:
    if options.coordinator is None:
        who = "not all processes of the detected cluster have come"
    elif options.process_index == 0:
        who = f"not all of the {options.processes} processes have come to {options.coordinator}"
    else:
        who = (
            f"no coordinator at {options.coordinator}, or not all of the {options.processes} "
            "processes have come to it"
        )
    return (
        f"{who} within {options.start_timeout:g} s (--start-timeout); --distributed none runs "
        "this process alone"
    )


def _address(text: str) -> None:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {text!r}: HOST:PORT is needed, as 10.0.0.1:12345")


def _typed(name: str, value: str):
    kind = {
        "processes": int,
        "process_index": int,
        "start_timeout": float,
        "peer_timeout": float,
        "stall_timeout": float,
    }.get(name, str)
    try:
        return kind(value)
    except ValueError:
        raise UserError(
            f"--{name.replace('_', '-')} {value!r}: a {'whole ' * (kind is int)}number is needed"
        ) from None

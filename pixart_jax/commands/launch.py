"""``python -m pixart_jax launch --processes N -- PROGRAM …``: N processes of one program on this
machine, for tests and experiments.

They find each other as processes on several machines do: through JAX's coordination service, on a
free port of this machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from pixart_jax import cli
from pixart_jax.errors import UserError
from pixart_jax.parallel import DISTRIBUTED_ENV_VARS

PROG = "python -m pixart_jax launch"
_LIBC = ctypes.CDLL(None)
_DEVICES = "--xla_force_host_platform_device_count"
_writing = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Start several local processes of a program: launch --processes 2 -- train.py configs/NAME.py
    --workdir DIR."""

    processes: int = 2
    """How many."""
    devices_per_process: int | None = None
    """Simulated CPU devices of each process (XLA's host platform device count); by default as the
    environment says."""
    logs: Path | None = None
    """A folder for each process's output, process-K.log; process 0's is shown as well. By default
    all is shown, each line after [K]."""
    patience: float = 20.0
    """Seconds that the others have to end by themselves once one has failed; then they are
    killed."""


def main(argv: Sequence[str]) -> int:
    """Exit status: of the process that failed first, or 0."""
    own, command = list(argv), []
    if "--" in own:
        own, command = own[: own.index("--")], own[own.index("--") + 1 :]
    arguments = cli.parse(Arguments, own, prog=PROG, description=Arguments.__doc__)
    if not command:
        raise UserError(
            f"which program? {PROG} --processes 2 -- train.py configs/NAME.py --workdir DIR"
        )
    for flag in ("processes", "devices_per_process"):
        if (value := getattr(arguments, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value}: at least 1")
    if command[0] == "-m" or command[0].endswith(".py"):
        if command[0] != "-m" and not Path(command[0]).is_file():
            raise UserError(f"no program {command[0]}")
        command = [sys.executable, *command]
    elif shutil.which(command[0]) is None:
        raise UserError(f"no program {command[0]!r}: a .py file, -m MODULE, or a command")
    if arguments.logs is not None:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    return run(arguments, command)


def run(arguments: Arguments, command: list[str]) -> int:
    """Start the processes, show their output, pass signals on; leave none behind."""
    port = free_port()
    children: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []

    def pass_on(number: int, _frame) -> None:
        for child in children:
            child.send_signal(number)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    old = {number: signal.signal(number, pass_on) for number in signals}
    try:
        for k in range(arguments.processes):
            log = arguments.logs / f"process-{k}.log" if arguments.logs else None
            child = subprocess.Popen(
                command,
                env=_environment(arguments, k, port),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if log or k else subprocess.PIPE,
                start_new_session=True,  # the terminal's Ctrl-C is passed on once
                preexec_fn=_die_with_parent,
            )
            children.append(child)
            sinks = ((child.stdout, sys.stderr if k else sys.stdout), (child.stderr, sys.stderr))
            for source, sink in sinks:
                if source is not None:
                    job = (k, source, None if log and k else sink, log)
                    readers.append(threading.Thread(target=_show, args=job, daemon=True))
                    readers[-1].start()
        return _wait(children, arguments.patience)
    finally:
        _kill(children)
        for reader in readers:
            reader.join(5)
        for number, handler in old.items():
            signal.signal(number, handler)


def _environment(arguments: Arguments, k: int, port: int) -> dict[str, str]:
    place = (f"localhost:{port}", str(arguments.processes), str(k))
    environment = dict(os.environ) | dict(zip(DISTRIBUTED_ENV_VARS, place, strict=True))
    environment.setdefault("PYTHONUNBUFFERED", "1")
    if arguments.devices_per_process is not None:
        flags = re.sub(rf"{_DEVICES}=\d+", "", environment.get("XLA_FLAGS", ""))
        flags = f"{flags} {_DEVICES}={arguments.devices_per_process}"
        environment["XLA_FLAGS"] = flags.strip()
        environment.setdefault("JAX_PLATFORMS", "cpu")
    return environment


def _wait(children: list[subprocess.Popen], patience: float) -> int:
    """Wait until all have ended; the others have ``patience`` seconds after the first failure."""
    status, deadline = 0, float("inf")
    while True:
        states = [child.poll() for child in children]
        failed = next(((k, s) for k, s in enumerate(states) if s), None)
        if not status and failed:
            k, status = failed
            deadline = time.monotonic() + patience
            if status < 0:
                _say(f"process {k} was killed by {signal.Signals(-status).name}")
        if None not in states:
            return status if status >= 0 else 128 - status
        if time.monotonic() > deadline:
            left = ", ".join(str(k) for k, state in enumerate(states) if state is None)
            _say(f"process {left} still at work {patience:g} s after another's end: killed")
            _kill(children)
            deadline = float("inf")
        time.sleep(0.1)


def _kill(children: list[subprocess.Popen]) -> None:
    """End what is left with all that it has started: each leads a session of its own."""
    for child in children:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    for child in children:
        child.wait()


def _show(k: int, source: IO[bytes], sink: IO[str] | None, log: Path | None) -> None:
    """Copy a process's output to its log, and line by line (a bar's end is \\r) to the terminal."""
    prefix, pending = b"" if log else f"[{k}] ".encode(), b""
    with open(log or os.devnull, "ab", buffering=0) as file:
        while chunk := os.read(source.fileno(), 1 << 16):
            file.write(chunk)
            *lines, pending = re.split(rb"(?<=[\r\n])", pending + chunk)
            _write(sink, b"".join(prefix + line for line in lines))
    _write(sink, prefix + pending + b"\n" if pending else b"")


def _write(sink: IO[str] | None, data: bytes) -> None:
    if sink is not None and data:
        with _writing, contextlib.suppress(ValueError, OSError):
            sink.write(data.decode(errors="replace"))
            sink.flush()


def _say(text: str) -> None:
    _write(sys.stderr, f"launch: {text}\n".encode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """In the child, before it begins: kill it when the launcher ends, however that ends (Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

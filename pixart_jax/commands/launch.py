"""``python -m pixart_jax launch --processes N -- PROGRAM …``: N processes of one program on this
machine, for tests and experiments.

They find each other as processes on several machines do: JAX's own coordination service, on a free
port of this machine.
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

from pixart_jax import cli
from pixart_jax.errors import UserError
from pixart_jax.parallel import DISTRIBUTED_ENV_VARS

PROG = "python -m pixart_jax launch"
# seconds that the others have to end by themselves, with their own last words, once one has ended
# badly
_PATIENCE = 20.0
_LIBC = ctypes.CDLL(None)
_DEVICES = "--xla_force_host_platform_device_count"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Start several local processes of a program: launch --processes 2 -- train.py configs/NAME.py
    --workdir DIR."""

    processes: int = 2
    """How many."""
    devices_per_process: int | None = None
    """Simulated CPU devices that each process has (XLA's host platform device count); by default as
    the environment says."""
    port: int = 0
    """Of process 0's coordination service; 0: a free one."""
    logs: Path | None = None
    """A folder for each process's output, process-K.log; process 0's is shown as well. By default
    all is shown, each line after [K]."""
    patience: float = _PATIENCE
    """Seconds that the others have to end by themselves once one has ended badly; then they are
    killed."""


def main(argv: Sequence[str]) -> int:
    """Exit status: of the process that ended badly first, or 0."""
    argv = list(argv)
    if "--" in argv:
        at = argv.index("--")
        own, command = argv[:at], argv[at + 1 :]
    else:
        own, command = argv, []
    arguments = cli.parse(Arguments, own, prog=PROG, description=Arguments.__doc__)
    if not command:
        raise UserError(
            f"which program? {PROG} --processes 2 -- train.py configs/NAME.py --workdir DIR"
        )
    if arguments.processes < 1:
        raise UserError(f"--processes {arguments.processes}: at least 1")
    if arguments.devices_per_process is not None and arguments.devices_per_process < 1:
        raise UserError(f"--devices-per-process {arguments.devices_per_process}: at least 1")
    if not 0 <= arguments.port < 65536:
        raise UserError(f"--port {arguments.port}: 1 to 65535, or 0 for a free one")
    if arguments.logs is not None:
        arguments.logs.mkdir(parents=True, exist_ok=True)
    return Launch(arguments, executable(command)).run()


def executable(command: Sequence[str]) -> list[str]:
    """The command to run: a Python file or -m MODULE under this Python, anything else as it is.
    UserError where there is no such thing."""
    first = command[0]
    if first == "-m":
        return [sys.executable, *command]
    if first.endswith(".py"):
        if not Path(first).is_file():
            raise UserError(f"no program {first}")
        return [sys.executable, *command]
    if shutil.which(first) is None:
        raise UserError(f"no program {first!r}: a .py file, -m MODULE, or a command")
    return list(command)


class Launch:
    """The processes of one call."""

    def __init__(self, arguments: Arguments, command: list[str]):
        self._arguments, self._command = arguments, command
        self._told: int | None = None  # the signal that was passed on
        self._tell = threading.Lock()

    def run(self) -> int:
        port = self._arguments.port or _free_port()
        old = {
            number: signal.signal(number, self._pass_on)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        }
        self._children: list[subprocess.Popen] = []
        readers = []
        try:
            for k in range(self._arguments.processes):
                child = subprocess.Popen(
                    self._command,
                    env=self._environment(k, port),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT
                    if self._arguments.logs is not None or k
                    else subprocess.PIPE,
                    # the terminal's ctrl-C comes here alone, and is passed on once
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
                self._children.append(child)
                for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                    if source is not None:
                        readers.append(
                            threading.Thread(
                                target=self._show,
                                args=(k, source, sink if k == 0 else sys.stderr),
                                daemon=True,
                            )
                        )
                        readers[-1].start()
            return self._wait()
        finally:
            self._kill()
            for reader in readers:
                reader.join(5)
            for number, handler in old.items():
                signal.signal(number, handler)

    def _environment(self, k: int, port: int) -> dict[str, str]:
        """This process's environment, and where it belongs."""
        environment = dict(os.environ)
        environment |= dict(
            zip(
                DISTRIBUTED_ENV_VARS,
                (f"localhost:{port}", str(self._arguments.processes), str(k)),
                strict=True,
            )
        )
        environment.setdefault("PYTHONUNBUFFERED", "1")
        if self._arguments.devices_per_process is not None:
            flags = re.sub(rf"{_DEVICES}=\d+", "", environment.get("XLA_FLAGS", ""))
            environment["XLA_FLAGS"] = (
                f"{flags} {_DEVICES}={self._arguments.devices_per_process}".strip()
            )
            environment.setdefault("JAX_PLATFORMS", "cpu")
        return environment

    def _wait(self) -> int:
        """Until all have ended; the first bad status is the launcher's, and the others have
        ``patience`` from then on."""
        first: int | None = None
        deadline = float("inf")
        while True:
            states = [child.poll() for child in self._children]
            if first is None and (
                bad := [(k, status) for k, status in enumerate(states) if status]
            ):
                k, status = bad[0]
                first, deadline = status, time.monotonic() + self._arguments.patience
                if status < 0:
                    self._say(f"process {k} was killed by {signal.Signals(-status).name}")
            if all(status is not None for status in states):
                return 0 if first is None else first if first > 0 else 128 - first
            if time.monotonic() > deadline:
                left = [k for k, status in enumerate(states) if status is None]
                self._say(
                    f"process {', '.join(map(str, left))} still at work "
                    f"{self._arguments.patience:g} s after another's end: killed"
                )
                self._kill()
                deadline = float("inf")
            time.sleep(0.1)

    def _pass_on(self, number: int, _frame) -> None:
        """A signal to this process is one to all."""
        self._told = number
        for child in self._children:
            if child.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    def _kill(self) -> None:
        """End whatever is left, with all that it has started."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # each is the leader of a session of its own
        for child in self._children:
            child.wait()

    def _show(self, k: int, source, sink) -> None:
        """A process's output: into its log where there is one, and on the terminal, with [K] before
        each line but process 0's in a log."""
        folder = self._arguments.logs
        log = open(folder / f"process-{k}.log", "ab") if folder is not None else None  # noqa: SIM115
        start = b"" if log is not None else f"[{k}] ".encode()
        with contextlib.ExitStack() as stack:
            if log is not None:
                stack.callback(log.close)
            line = b""
            while part := os.read(source.fileno(), 1 << 16):
                if log is not None:
                    log.write(part)
                    log.flush()
                    if k:
                        continue
                *lines, line = (line + part).split(b"\n")
                self._write(sink, b"".join(start + one + b"\n" for one in lines))
                if b"\r" in line:  # a bar that is being drawn
                    self._write(
                        sink,
                        b"\r" + start + line.rsplit(b"\r", 1)[1]
                        if line.rsplit(b"\r", 1)[1]
                        else b"",
                    )
            if line:
                self._write(sink, start + line + b"\n")

    def _write(self, sink, data: bytes) -> None:
        if data:
            with self._tell, contextlib.suppress(ValueError, OSError):
                buffer = getattr(sink, "buffer", None)
                if buffer is None:
                    sink.write(data.decode(errors="replace"))
                else:
                    buffer.write(data)
                sink.flush()

    def _say(self, text: str) -> None:
        self._write(sys.stderr, f"launch: {text}\n".encode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _die_with_parent() -> None:
    """In the child, before it begins: killed when the launcher is, however that ends (Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

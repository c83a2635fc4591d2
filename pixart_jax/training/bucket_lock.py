"""The lock of a run in a bucket, and the record of the checkpoints that count.

Buckets have no locks that end with their process. The lock is one object, written only where its
version is still the one that the writer saw. Its holder renews it; whoever finds it unchanged for a
lease, on its own clock, takes it over. A holder that was frozen meanwhile finds out at its next
write. A checkpoint counts if it has Orbax's mark and is recorded in the lock: a late holder can
still write a mark, and cannot record it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from pixart_jax import files
from pixart_jax.errors import Notice, Unavailable, UserError

LEASE_SECONDS = float(os.environ.get("PIXART_JAX_LEASE_SECONDS", 120))
"""A lock that was not renewed for so long is free; it is renewed four times as often."""


class RunLock:
    """The lock of the run at ``address``; ``acquire`` and ``release`` it."""

    def __init__(self, address: str):
        self.run, self.address = address, files.join(address, ".lock")
        self._version, self._lost = "", ""
        self._writing, self._released = threading.Lock(), threading.Event()
        pid = os.getpid()
        self._state: dict[str, Any] = {
            "token": secrets.token_hex(8),
            "host": platform.node(),
            "pid": pid,
            "machine": _machine(),
            "started": _started(pid),
            "lease": LEASE_SECONDS,
            "beat": 0,
            "committed": None,  # steps; None: the marks alone say
        }

    @property
    def committed(self) -> list[int] | None:
        """The steps of the checkpoints that count; None where all marked ones do."""
        return self._state["committed"]

    def acquire(self) -> None:
        """Take the lock, and keep it by a thread. UserError where another process holds it."""
        seen, since = "", 0.0
        while not self._version:
            with contextlib.suppress(files.Conflict):
                self._version = files.create(self.address, self._text())
                break
            try:
                version = files.stat(self.address).version
                holder = json.loads(files.read_bytes(self.address))
                who = f"{holder['host']} (process {holder['pid']})"
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.address} is not a run's lock: move it away") from None
            silent = version == seen and time.monotonic() - since >= holder["lease"]
            if holder["token"] is None or silent or _is_dead(holder):
                with contextlib.suppress(files.Conflict):
                    self._state["committed"] = holder["committed"]
                    self._version = files.replace(self.address, self._text(), version)
                    break
            elif version != seen:
                if seen:
                    raise UserError(
                        f"workdir {self.run} is in use by another run, on {who}: wait for it, or "
                        "name another one"
                    )
                seen, since = version, time.monotonic()
                message = (
                    f"workdir {self.run} is locked by {who}: waiting for a sign of life, at most "
                    f"{holder['lease']:g} s"
                )
                warnings.warn(message, Notice, stacklevel=2)
            time.sleep(min(holder["lease"] / 10, 5.0))
        threading.Thread(target=self._renew, daemon=True).start()

    def record(self, steps: list[int]) -> None:
        """From now on these checkpoints count if they are marked, and no others. Unavailable where
        the lock was lost."""
        self._write(committed=sorted(steps))

    def renew(self) -> None:
        """Write the lock anew. Unavailable where it was lost."""
        self._write()

    def check(self) -> None:
        """Unavailable where the lock was lost."""
        if self._lost:
            raise Unavailable(self._lost)

    def release(self) -> None:
        """Free the lock, unless it was lost."""
        self._released.set()
        with contextlib.suppress(Unavailable):
            self._write(token=None)

    def _text(self) -> bytes:
        return json.dumps(self._state).encode()

    def _write(self, **changes) -> None:
        with self._writing:
            self.check()
            before = self._state
            self._state = {**before, **changes, "beat": before["beat"] + 1}
            try:
                self._version = files.replace(self.address, self._text(), self._version)
            except files.Conflict:
                self._lost = (
                    f"workdir {self.run} was taken over by another process while this one was "
                    "silent; nothing more is saved here"
                )
                self.check()
            except Exception:
                self._state = before
                raise

    def _renew(self) -> None:
        while not self._released.wait(LEASE_SECONDS / 4):
            try:
                self.renew()
            except Exception:  # an outage, which a commit will report, or the lock is lost
                if self._lost:
                    return


def _machine() -> str | None:
    """This boot of this machine, and the namespace in which its process numbers hold."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return None


def _started(pid: int) -> str | None:
    """When a process of this machine was started, in its clock's ticks; None: it does not run."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None


def _is_dead(holder: dict) -> bool:
    """Whether the holder was a process of this machine and has ended."""
    here = holder["machine"] is not None and holder["machine"] == _machine()
    return here and _started(holder["pid"]) != holder["started"]

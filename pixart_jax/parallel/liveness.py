"""Detection of dead, hung and failed peers, through JAX's coordination service.

JAX detects a dead peer too, but ends the process with a C++ fatal error, or leaves it waiting in a
collective. Here each process publishes a counter every few seconds and reads the counters of the
others. A peer whose counter stops for ``peer_timeout`` seconds, or which reports a failure, ends
this process with one line and exit status PEER_LOST; so does a run in which no process completes a
step for ``stall_timeout`` seconds. A heartbeat thread may hang with the service; a watchdog judges.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from pixart_jax.errors import UserError

PEER_LOST = 76  # exit status
_ORDERLY = (0, 75)  # statuses that all processes reach together: done, or stopped and saved
_GRACE = 10.0  # seconds in which a process may report a peer's failure in its own words
_UNWINDING = 120.0  # seconds in which a failing process may end by itself, after a checkpoint say
_KEY = "pixart_jax/alive/"
_FOREVER = 10 * 24 * 3600 * 1000  # milliseconds; the watchdog ends a wait for a dead peer
# How an exception of a collective reads whose peer is gone.
_SYMPTOM = re.compile(
    r"gloo|nccl|collective|connection|socket|peer|barrier|unavailable|deadline_exceeded|aborted"
    r"|coordination",
    re.I,
)
_RESTART = "what was saved holds: start all processes again with the same command"

_monitor: PeerMonitor | None = None
_handler: Any = None  # a ctypes callback must not be collected while it is installed
_barriers = 0


def start_monitor(peer_timeout: float, stall_timeout: float) -> None:
    """Watch the peers from now on, in seconds; do nothing where there are none."""
    global _monitor
    if jax.process_count() > 1:
        _monitor = PeerMonitor(peer_timeout, stall_timeout)
    handle_sigabrt(_monitor.aborted if _monitor else None)


def report_step(step: int | None) -> None:
    """Report a completed step; None before work that takes longer than a step."""
    if _monitor is not None:
        _monitor.step = step


@contextlib.contextmanager
def report_failures() -> Iterator[None]:
    """Publish an exception of the block to the peers before this process waits for anything.

    An interruption is not published: every process receives it in its own way.
    """
    try:
        yield
    except Exception as error:
        if _monitor is not None:
            _monitor.fail(error)
        raise


def run_with_peers(run: Callable[[], int]) -> int:
    """Return run()'s exit status, after publishing it to the other processes.

    Processes that all succeed end together. Where this one fails, the others learn of it at once
    and this process ends here, with a traceback where the program is at fault.
    """
    try:
        status = run()
    except BaseException as error:
        if _monitor is None:
            raise
        if _is_symptom(error) and (lost := _monitor.verdict()) is not None:
            print(f"error: {lost}", file=sys.stderr, flush=True)
            status = PEER_LOST
        else:
            traceback.print_exc()
            status = 1
    return status if _monitor is None else _monitor.leave(status)


def barrier(name: str) -> None:
    """Wait, for hours if need be, until every process has called this."""
    global _barriers
    if jax.process_count() > 1:
        _barriers += 1  # ids are used once; all processes count alike
        _state().client.wait_at_barrier(f"pixart_jax/{name}/{_barriers}", _FOREVER)


def run_on_first_process(name: str, make: Callable[[], object]) -> None:
    """Call make() on process 0; the others wait for it. All must call this in one order."""
    if jax.process_index() == 0:
        make()
    barrier(name)


def _state() -> Any:
    from jax._src import distributed  # the coordination client has no public name

    return distributed.global_state


def _is_symptom(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}"
    return not isinstance(error, UserError) and _SYMPTOM.search(text) is not None


@dataclasses.dataclass
class _Peer:
    """What a peer last published, and when (monotonic seconds) that and its end were first read."""

    seen: float
    ended: float = 0.0
    beat: int = -1
    step: int | None = None
    end: str = ""


class PeerMonitor:
    """The two threads. step: of this process, None while no step is due."""

    def __init__(self, peer_timeout: float, stall_timeout: float):
        state = _state()
        self._client, self._coordinator = state.client, state.coordinator_address
        self._index, self._count = state.process_id, state.num_processes
        self._timeout, self._stall = peer_timeout, stall_timeout
        self._interval = min(2.0, peer_timeout / 5)
        self.step: int | None = None
        self._end = ""  # published: "done", or how this process failed or ended
        self._leaving = False
        self._failed_at: float | None = None
        self._traceback: str | None = None
        now = time.monotonic()
        self._answered = self._progressed = now  # the service; any process's step
        self._beats = 0
        self._peers = {k: _Peer(now) for k in range(self._count) if k != self._index}
        self._lock, self._stop = threading.Lock(), threading.Event()
        for target in (self._heartbeat, self._watchdog):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def fail(self, error: BaseException) -> None:
        """Publish the first failure; the peers notice a lost peer by themselves."""
        if self._failed_at is None:
            text = " ".join((str(error).strip().splitlines() or [""])[0].split())
            if not isinstance(error, UserError):
                text, self._traceback = f"{type(error).__name__}: {text}", traceback.format_exc()
            if not _is_symptom(error):
                self._end = f"has failed ({text[:300]})"
            self._failed_at = time.monotonic()

    def verdict(self) -> str | None:
        """Wait until the peer that broke a collective is known; None where no peer is to blame."""
        timeout = min(self._timeout, max(5.0, 5 * self._interval))
        return self._wait(lambda: self._problem(timeout), timeout + 2 * self._interval) or None

    def leave(self, status: int) -> int:
        """Publish this process's exit status. Return it where all end in order, or exit."""
        self.step, self._leaving = None, True
        orderly = status in _ORDERLY
        self._end = "done" if orderly else f"has ended with status {status}, its output says why"
        published = self._beats + 2
        self._wait(lambda: self._beats >= published, 3 * self._interval + 2)
        if orderly:
            while not self._all_ended():
                time.sleep(0.1)
                if line := self._problem(self._timeout):
                    _exit(PEER_LOST, f"error: {line}\n")
            self._stop.set()
            handle_sigabrt(None)
            return status
        if self._index == 0:  # the service ends with this process: the peers read this status first
            self._wait(self._all_ended, 2.0 if status == PEER_LOST else _GRACE + 3)
        _exit(status)

    def _all_ended(self) -> bool:
        return all(peer.end for peer in self._peers.values())

    def _wait(self, condition: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (result := condition()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return result

    def _heartbeat(self) -> None:
        beat = 0
        while not self._stop.is_set():
            beat += 1
            mine = json.dumps({"beat": beat, "step": self.step, "end": self._end})
            try:
                self._client.key_value_set(f"{_KEY}{self._index}", mine, allow_overwrite=True)
                found = self._client.key_value_dir_get(_KEY)
            except Exception:  # gone or slow: the watchdog counts the time since the last answer
                self._stop.wait(self._interval)
                continue
            now = time.monotonic()
            with self._lock:
                self._answered = now
                for key, text in found:
                    k, new = int(key.rsplit("/", 1)[1]), _Peer(now, ended=now, **json.loads(text))
                    old = self._peers.get(k)
                    if old is None or new.beat == old.beat:  # itself, or nothing new
                        continue
                    if new.step != old.step:
                        self._progressed = now
                    if new.end == old.end:
                        new.ended = old.ended
                    self._peers[k] = new
            self._beats += 1
            self._stop.wait(self._interval)

    def _watchdog(self) -> None:
        last, step = time.monotonic(), self.step
        while not self._stop.wait(0.25):
            now = time.monotonic()
            with self._lock:
                if now - last > 5:  # this process was suspended: the peers are not to blame
                    self._answered = self._progressed = now
                    for peer in self._peers.values():
                        peer.seen = now
                if self.step != step:
                    step, self._progressed = self.step, now
            last = now
            if self._leaving:
                continue
            if self._failed_at and now - self._failed_at > _UNWINDING + self._timeout:
                _exit(1 if self._traceback else 2, self._traceback or f"error: {self._end}\n")
            if not self._end and (line := self._problem(self._timeout, _GRACE)):
                if self._index == 0:  # the service ends with this process: the peers judge first
                    self._stop.wait(2 * self._interval + 1)
                if not self._end:
                    _exit(PEER_LOST, f"\nerror: {line}\n")

    def _problem(self, timeout: float, grace: float = 0.0) -> str | None:
        """What is wrong with the peers, or None. grace: seconds since a peer's failure."""
        with self._lock:
            now = time.monotonic()
            for k, peer in sorted(self._peers.items()):
                name, silent = f"process {k} of {self._count}", now - peer.seen
                if peer.end not in ("", "done"):
                    if now - peer.ended > grace:
                        return f"{name} {peer.end}; {_RESTART}"
                elif not peer.end and now - self._answered <= timeout < silent:
                    what = f"has not answered for {silent:.0f} s: it is dead or hangs"
                    return f"{name} {what}; {_RESTART}"
            if (silent := now - self._answered) > timeout:
                name = f"process 0 of {self._count}, the coordinator,"
                return f"{name} has not answered for {silent:.0f} s; {_RESTART}"
            still = now - self._progressed
            if not self._stall or self.step is None or still <= self._stall:
                return None
            steps = {k: peer.step for k, peer in self._peers.items()} | {self._index: self.step}
            least = min(step for step in steps.values() if step is not None)
            last = [str(k) for k in sorted(steps) if steps[k] in (None, least)]
            who = f"process {', '.join(last[:8])}" if len(last) < self._count else "all"
            return (
                f"no step was done for {still:.0f} s though all {self._count} processes live; "
                f"{who} at step {least}; {_RESTART}"
            )

    def aborted(self) -> str | None:
        """The line for an abort by JAX; None while the coordinator still accepts connections."""
        host, _, port = self._coordinator.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return None
        end = self._peers[0].end if 0 in self._peers else ""
        why = f" (it {end})" if end not in ("", "done") else ""
        name = f"process 0 of {self._count}, the coordinator at {self._coordinator},"
        return f"{name} is gone{why}; {_RESTART}"


def handle_sigabrt(explain: Callable[[], str | None] | None, status: int = PEER_LOST) -> None:
    """Explain an abort by JAX's coordination client in one line and exit with a status.

    explain: the line, or None for an ordinary abort; in its place None restores JAX's own handling.
    The handler is C's: an abort never returns to Python.
    """
    global _handler

    def on_abort(_number: int) -> None:
        if explain is not None and (line := explain()) is not None:
            os.write(2, f"\nerror: {line}\n".encode())
            os._exit(status)  # else abort() continues when this returns

    default = ctypes.c_void_p(0)
    handler: Any = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort) if explain else default
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)
    _handler = handler


def _exit(status: int, text: str = "") -> NoReturn:
    """End the process now: a barrier or finalizer would wait for peers that are gone."""
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flush.start()
    flush.join(1)
    if text:
        os.write(2, text.encode())
    os._exit(status)

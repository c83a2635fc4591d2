"""Whether the other processes of a run live: a sign of life each, kept by JAX's coordination
service, and what follows where one fails.

JAX notices a dead peer too, but ends a process with a C++ fatal error, or lets it wait in a
collective. Here each process writes a counter every few seconds and reads those of the others. A
peer whose counter stands still for ``peer_timeout``, or which says that it has failed, ends this
process with one line and status PEER_LOST; so does a run in which no step is done for
``stall_timeout`` though all are alive. Two threads: one speaks with the service and may hang with
it, the other judges.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback

import jax

from pixart_jax.errors import UserError

PEER_LOST = 76  # exit status
_ORDERLY = (0, 75)  # ends that all processes reach together: done, or told to stop and saved
# seconds that a peer's failure leaves the others to end by themselves, with their own account of it
_GRACE = 10.0
# seconds that a failing process may take to end by itself: the save that is under way, say
_UNWINDING = 120.0
_KEY = "pixart_jax/alive/"
_SYMPTOM = re.compile(
    r"gloo|nccl|collective|connection|socket|peer|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|coordination",
    re.I,
)
_AGAIN = "what was saved holds: start all processes again with the same command"

_watch: PeerMonitor | None = None
_late: str | None = None  # what an abort during the start means
_handler = None  # ctypes' callback must outlive this module's functions


def start_monitor(peer_timeout: float, stall_timeout: float) -> None:
    """Watch the peers from now on; nothing where there are none."""
    global _watch, _late
    _late = None
    if jax.process_count() > 1:
        from jax._src import distributed  # the client of the service has no public name

        state = distributed.global_state
        _watch = PeerMonitor(
            state.client,
            state.coordinator_address,
            state.process_id,
            state.num_processes,
            peer_timeout,
            stall_timeout,
        )
    else:
        handle_sigabrt(None)


def has_peers() -> bool:
    """Whether this run has peers."""
    return _watch is not None


def report_step(step: int | None) -> None:
    """A step of the run is done, the same on every process; None: what follows takes its time
    (stage's end, compilation)."""
    if _watch is not None:
        _watch.step = step


@contextlib.contextmanager
def report_failures():
    """A fault inside is made known to the peers at once, before this process waits for anything on
    its way out."""
    try:
        yield
    # not an interruption: that is no fault, and all processes hear of it in their own way
    except Exception as fault:
        if _watch is not None:
            _watch.fail(fault)
        raise


def diagnose_peer_failure(fault: BaseException) -> str | None:
    """The line about the peer that was lost or has failed where ``fault`` comes of it, or None.
    Waits until that is known."""
    if _watch is None or not _is_symptom(fault):
        return None
    return _watch.verdict()


def _is_symptom(fault: BaseException) -> bool:
    """Whether a fault may come of a lost peer: a collective that broke."""
    return (
        not isinstance(fault, UserError)
        and _SYMPTOM.search(f"{type(fault).__name__} {fault}") is not None
    )


def shut_down(status: int) -> int:
    """Tell the peers of this process's end. Returns where all end in order; else ends the process
    with ``status``."""
    if _watch is None:
        return status
    return _watch.leave(status)


def run_on_first_process(name: str, make) -> None:
    """make() on process 0; the others return when it is done. Calls with one name must come in the
    same order on every process."""
    if jax.process_index() == 0:
        make()
    broadcast_string(f"once/{name}", "done")


def broadcast_string(name: str, text: str) -> str:
    """What process 0 says, on every process; as often as it is called with a name, each time
    anew."""
    if jax.process_count() == 1:
        return text
    key = f"pixart_jax/{name}/{_number(name)}"
    if jax.process_index() == 0:
        _client().key_value_set(key, text)
        return text
    return _patiently(lambda: _client().blocking_key_value_get(key, 5_000))


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        number = _number(name)
        _client().key_value_set(f"pixart_jax/{name}-came/{number}/{jax.process_index()}", "came")
        for k in range(jax.process_count()):
            _patiently(
                lambda k=k: _client().blocking_key_value_get(
                    f"pixart_jax/{name}-came/{number}/{k}", 5_000
                )
            )


def _patiently(ask):
    while True:  # the watch ends this where a process fails
        try:
            return ask()
        except Exception as fault:
            if "DEADLINE_EXCEEDED" not in str(fault):
                raise


def _client():
    from jax._src import distributed  # the client of the coordination service has no public name

    return distributed.global_state.client


def _number(name: str) -> int:
    _counted[name] = _counted.get(name, 0) + 1
    return _counted[name]


_counted: dict[str, int] = {}


class PeerMonitor:
    """The two threads. step: of the run, None while no step is due."""

    def __init__(
        self,
        client,
        coordinator: str,
        index: int,
        count: int,
        peer_timeout: float,
        stall_timeout: float,
    ):
        self._client, self._coordinator, self._index, self._count = (
            client,
            coordinator,
            index,
            count,
        )
        self._patience, self._stall = peer_timeout, stall_timeout
        self._every = min(2.0, peer_timeout / 5)
        self.step: int | None = None
        self._state, self._what = "runs", ""
        self._failed: float | None = None
        now = time.monotonic()
        self._round = self._moved = now  # last answer of the service; last step seen anywhere
        self._published = 0  # rounds done
        self._peers = {
            k: {"n": -1, "at": now, "state": "runs", "what": "", "since": now, "step": None}
            for k in range(count)
            if k != index
        }
        self._lock, self._stop = threading.Lock(), threading.Event()
        for target in (self._speak, self._judge):
            threading.Thread(target=target, name=f"liveness{target.__name__}", daemon=True).start()

    # What the run tells.

    def fail(self, fault: BaseException) -> None:
        if self._failed is None:
            line = " ".join((str(fault).strip().splitlines() or [""])[0].split())
            said = line if isinstance(fault, UserError) else f"{type(fault).__name__}: {line}"
            self._trace = None if isinstance(fault, UserError) else traceback.format_exc()
            # else the peers need not hear of it: they see for themselves who is lost
            if not _is_symptom(fault):
                self._state, self._what = "fails", said[:300]
            self._failed = time.monotonic()

    def verdict(self) -> str | None:
        quick = min(self._patience, max(5.0, 5 * self._every))
        deadline = time.monotonic() + quick + 2 * self._every
        while time.monotonic() < deadline:
            if line := self._lost(time.monotonic(), quick, 0):
                return line
            time.sleep(0.2)
        return None

    def leave(self, status: int) -> int:
        self.step, line = None, None
        with self._lock:
            self._state, self._what = "ended", str(status)
        done = self._published + 2
        self._until(lambda: self._published >= done, 3 * self._every + 2)
        if status in _ORDERLY:
            while line is None and not self._all_ended():
                time.sleep(0.1)
                line = self._lost(time.monotonic(), self._patience, 0)
            if line is None:
                self._stop.set()
                handle_sigabrt(None)
                return status
            _end(PEER_LOST, f"error: {line}\n")
        elif self._index == 0:  # the service is here: the others read of this end before it goes
            self._until(self._all_ended, 2.0 if status == PEER_LOST else _GRACE + 3)
        _end(status)

    def _all_ended(self) -> bool:
        return all(peer["state"] == "ended" for peer in self._peers.values())

    def _until(self, condition, limit: float) -> None:
        deadline = time.monotonic() + limit
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)

    # What the threads do.

    def _speak(self) -> None:
        number = 0
        while not self._stop.is_set():
            number += 1
            with self._lock:
                mine = json.dumps(
                    {"n": number, "state": self._state, "what": self._what, "step": self.step}
                )
            try:
                self._client.key_value_set(f"{_KEY}{self._index}", mine, allow_overwrite=True)
                found = self._client.key_value_dir_get(_KEY)
            # the service is gone or slow: _judge counts the time since the last answer
            except Exception:
                self._stop.wait(self._every)
                continue
            now = time.monotonic()
            with self._lock:
                self._round = now
                for key, text in found:
                    peer = self._peers.get(int(key.rsplit("/", 1)[1]))
                    told = json.loads(text)
                    if peer is None or told["n"] == peer["n"]:
                        continue
                    if told["step"] != peer["step"]:
                        self._moved = now
                    if told["state"] != peer["state"]:
                        peer["since"] = now
                    peer.update(told, at=now)
            self._published += 1
            self._stop.wait(self._every)

    def _judge(self) -> None:
        before, step = time.monotonic(), self.step
        while not self._stop.wait(0.25):
            now = time.monotonic()
            with self._lock:
                # it was this process that slept: nobody else is to blame for the time
                if now - before > 5:
                    self._round, self._moved = now, now
                    for peer in self._peers.values():
                        peer["at"] = now
                if self.step != step:
                    step, self._moved = self.step, now
            before = now
            if (
                self._failed is not None
                and self._state != "ended"
                and now - self._failed > _UNWINDING + self._patience
            ):
                _end(1 if self._trace else 2, self._trace or f"error: {self._what}\n")
            if self._state == "runs" and (line := self._lost(now, self._patience, _GRACE)):
                # the service goes with this process: the others come to their own verdict first
                if self._index == 0:
                    self._stop.wait(2 * self._every + 1)
                if self._state == "runs":
                    _end(PEER_LOST, f"\nerror: {line}\n")

    def _lost(self, now: float, patience: float, grace: float) -> str | None:
        """The line about what is wrong with the others, or None."""
        with self._lock:
            for k, peer in sorted(self._peers.items()):
                who = f"process {k} of {self._count}"
                if peer["state"] == "fails" and now - peer["since"] > grace:
                    return f"{who} has failed ({peer['what']}); {_AGAIN}"
                if peer["state"] == "ended":
                    if peer["what"] not in map(str, _ORDERLY) and now - peer["since"] > grace:
                        return (
                            f"{who} has ended with status {peer['what']}, its output says why; "
                            f"{_AGAIN}"
                        )
                elif now - self._round <= patience and now - peer["at"] > patience:
                    return (
                        f"{who} has not answered for {now - peer['at']:.0f} s: it is dead or "
                        f"hangs; {_AGAIN}"
                    )
            if now - self._round > patience:
                return (
                    f"process 0 of {self._count}, the coordinator, has not answered for "
                    f"{now - self._round:.0f} s; {_AGAIN}"
                )
            if self._stall and self.step is not None and now - self._moved > self._stall:
                steps = {self._index: self.step} | {
                    k: peer["step"] for k, peer in self._peers.items()
                }
                least = min((step for step in steps.values() if step is not None), default=None)
                last = [str(k) for k in sorted(steps) if steps[k] in (None, least)]
                behind = (
                    "all stand"
                    if len(last) == self._count
                    else f"process {', '.join(last[:8])} stands"
                )
                return (
                    f"no step was done for {now - self._moved:.0f} s though all {self._count} "
                    "processes live; "
                    f"{behind} at step {least}; {_AGAIN}"
                )
        return None

    def aborted(self) -> str | None:
        """The line where JAX aborts this process because the coordinator is gone."""
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return None
        except OSError:
            said = self._peers.get(0, {"state": "runs", "what": ""})
            why = {"fails": f" after {said['what']}", "ended": f" with status {said['what']}"}.get(
                said["state"], ""
            )
            return (
                f"process 0 of {self._count}, the coordinator at {self._coordinator}, is "
                f"gone{why}; {_AGAIN}"
            )


def handle_sigabrt(late: str | None) -> None:
    """Say in one line what an abort by JAX's coordination client means, after its own C++ message,
    and exit with a status.

    late: the line for an abort while the processes are still coming (status 2); None: aborts are
    left as they are, unless peers are watched. A signal handler of Python's would never run, as the
    abort does not return to Python: hence C's.
    """
    global _late, _handler
    _late = late
    if late is None:
        if _handler is not None:
            ctypes.CDLL(None).signal(signal.SIGABRT, ctypes.c_void_p(0))
            _handler = None
        return

    def on_abort(_number: int) -> None:
        line, status = (
            (_late, 2)
            if _late is not None
            else (_watch.aborted() if _watch is not None else None, PEER_LOST)
        )
        if line is not None:
            os.write(2, f"\nerror: {line}\n".encode())
            os._exit(status)
        # returning lets abort() go on as if nobody had asked

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


def _end(status: int, text: str = ""):
    """End the process now: no barrier, no finalizer, which would wait for peers that are gone."""
    flush = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flush.start()
    flush.join(1)
    if text:
        os.write(2, text.encode())
    os._exit(status)

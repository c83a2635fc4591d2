"""SIGTERM and SIGINT: a run that is asked to stop saves its state, prints where it is, and ends
with a status that means "run me again".

One process handles the signal itself: while it trains, the signal waits until the step is done and
saved; at any other time (data being opened or encoded, a model being written: nothing that the next
start does not repeat) it ends the current work at once. A second signal ends the process
immediately; the last committed checkpoint holds.

Of several processes only one may receive the signal, and all must save the same step. JAX's
preemption service sees to that: it handles SIGTERM, notifies the other processes, and names a step
that none has reached yet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from pixart_jax.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class PreemptionHandler:
    """Handles signals while the context is open; in ``deferred()`` a signal waits for
    ``should_stop``."""

    def __init__(self):
        self._asked: str | None = None
        self._deferred = False
        self._before: dict = {}

    def __enter__(self) -> PreemptionHandler:
        # other threads may not set handlers
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            # with peers SIGTERM belongs to the preemption service
            numbers = _SIGNALS if alone else (signal.SIGINT,)
            handler = self._handle if alone else _forward_as_sigterm
            self._before = {number: signal.signal(number, handler) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self):
        """Inside, a first signal is only recorded."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._asked:
            raise Interrupted(self._asked)

    def should_stop(self, total: int) -> str | None:
        """The signal's name where the run is to stop at this step; every process asks at each step
        and gets the same answer."""
        if jax.process_count() > 1:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(total) else None
        return self._asked

    def _handle(self, number, _frame) -> None:
        name = signal.Signals(number).name
        if self._asked:
            os.write(2, f"\n{name} again: stopped at once, the last save holds\n".encode())
            os._exit(128 + number)
        self._asked = name
        if not self._deferred:
            raise Interrupted(name)
        os.write(
            2, f"\n{name}: the step is finished and saved first; once more stops at once\n".encode()
        )


def _forward_as_sigterm(number, _frame) -> None:
    os.kill(os.getpid(), signal.SIGTERM)

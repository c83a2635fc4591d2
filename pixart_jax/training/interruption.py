"""SIGTERM and SIGINT: a run that is told to stop saves where it is, says so, and ends with a status
that means "run me again".

One process hears the signal itself: while it trains, the signal waits until the step is done and
saved; at any other time (data being opened or encoded, a model being written: nothing that the next
start does not do again) it ends what is being done at once. A second signal ends the process on the
spot; the last committed save holds.

Of several processes the signal may reach one alone, and all must save the same step. JAX's own
preemption service sees to
that: it hears SIGTERM, tells the other processes, and names a step that none has reached yet.
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
    """Listens while the context is open. ``held()``: from now on a signal waits for ``reached``."""

    def __init__(self):
        self._asked: str | None = None
        self._held = False
        self._before: dict = {}

    def __enter__(self) -> PreemptionHandler:
        # elsewhere Python allows no handlers
        if threading.current_thread() is threading.main_thread():
            # SIGTERM is the preemption service's
            heard = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
            answer = self._hear if jax.process_count() == 1 else _pass_on
            self._before = {number: signal.signal(number, answer) for number in heard}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self):
        """Inside, a first signal is only noted."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._asked:
            raise Interrupted(self._asked)

    def should_stop(self, total: int) -> str | None:
        """The signal's name where the run is to be saved at this step and left; every process asks
        at each step, and all hear the same."""
        if jax.process_count() > 1:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(total) else None
        return self._asked

    def _hear(self, number, _frame) -> None:
        name = signal.Signals(number).name
        if self._asked:
            os.write(2, f"\n{name} again: stopped at once, the last save holds\n".encode())
            os._exit(128 + number)
        self._asked = name
        if not self._held:
            raise Interrupted(name)
        os.write(
            2, f"\n{name}: the step is finished and saved first; once more stops at once\n".encode()
        )


def _pass_on(number, _frame) -> None:
    os.kill(os.getpid(), signal.SIGTERM)

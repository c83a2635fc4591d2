"""train.py that sends itself a signal before its n-th step: python train_until_killed.py
N[:SIGNAL…] RECIPE --workdir DIR.

N = 0: never. SIGNAL: a name, SIGKILL by default; several, with commas, are sent one after the
other.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pixart_jax import cli
from pixart_jax.commands import train
from pixart_jax.training import loop

at, _, names = sys.argv[1].partition(":")
left, signals = int(at), [signal.Signals[name] for name in (names or "SIGKILL").split(",")]
real = loop.put


def put(batch, sharding):
    global left
    left -= 1
    if left == 0:
        for number in signals:
            os.kill(os.getpid(), number)
    return real(batch, sharding)


loop.put = put
sys.exit(cli.run(train.main, sys.argv[2:]))

"""train.py, killed by the kernel before its n-th step: python train_until_killed.py N RECIPE --workdir DIR. N = 0: never."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from pixart_jax import program
from pixart_jax.training import loop

left = int(sys.argv[1])
real = loop.put


def put(batch, sharding):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(batch, sharding)


loop.put = put
sys.exit(program.run(train.main, sys.argv[2:]))

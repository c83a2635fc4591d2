"""Lives of train.py that end by SIGKILL at random moments: python lives.py SEED KILLS LONGEST
RECIPE --workdir ADDRESS.

Each life is forked from this process, which has imported what takes long. Kills come up to LONGEST
seconds after a start; the last life ends by itself. Prints how many lives had ended before their
kill, with their statuses.

    python lives.py freeze:before|after:STEP RECIPE --workdir ADDRESS

One life that stops itself (SIGSTOP) in the commit of a step: before the step is recorded, or after,
when Orbax is about to mark it.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import botocore.session  # noqa: F401
import google.cloud.storage  # noqa: F401
import jax  # noqa: F401
import orbax.checkpoint  # noqa: F401

from pixart_jax import cli
from pixart_jax.commands import train
from pixart_jax.training import bucket, loop, run, stages  # noqa: F401


def freeze(when: str, step: int) -> None:
    """Stop this process in the commit of a step."""
    commit = bucket.Bucket.commit

    def frozen(self, number, *kept):
        if number == step and when == "before":
            os.kill(os.getpid(), signal.SIGSTOP)
        commit(self, number, *kept)
        if number == step and when == "after":
            os.kill(os.getpid(), signal.SIGSTOP)

    bucket.Bucket.commit = frozen


def live(argv: list[str], seconds: float | None) -> int:
    """One life; its status, −9 where it was killed after ``seconds``."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = cli.run(train.main, argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + (3600 if seconds is None else seconds)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    if sys.argv[1].startswith("freeze:"):
        _, when, step = sys.argv[1].split(":")
        freeze(when, int(step))
        sys.exit(cli.run(train.main, sys.argv[2:]))
    rng, kills, longest = random.Random(int(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
    done, others = 0, []
    while done < kills:
        status = live(sys.argv[4:], rng.uniform(0.0, longest))
        if status == -signal.SIGKILL:
            done += 1
            continue
        others.append(status)
        if status == 0:
            break  # the run is complete
    last = live(sys.argv[4:], None)
    print(f"killed {done} times; ended by themselves: {others}; the last life: {last}", flush=True)
    sys.exit(last)


main()

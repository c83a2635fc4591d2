"""Lives of train.py that end by SIGKILL at random moments: python lives.py SEED KILLS RECIPE
--workdir ADDRESS.

Each life is forked from this process, which has imported what takes long. The first two end in
their first commit; the second, for which all is compiled, tells how long that takes. The others end
within two such times; the last one ends by itself. Prints how many lives had ended before their
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


def live(argv: list[str], seconds: float = 3600.0, commits: bool = True) -> int:
    """One life; its status, −9 where it was killed after ``seconds``, or in its first commit."""
    child = os.fork()
    if child == 0:
        status = 1
        if not commits:
            bucket.Bucket.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        try:
            status = cli.run(train.main, argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + seconds
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
    rng, kills, argv = random.Random(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3:]
    done, others = 0, []
    while done < kills:
        if done < 2:
            begun = time.monotonic()
            status = live(argv, commits=False)
            usual = time.monotonic() - begun
        else:
            status = live(argv, rng.uniform(0.0, 2 * usual))
        if status != -signal.SIGKILL:
            others.append(status)
            break
        done += 1
    last = live(argv)
    print(f"killed {done} times; ended by themselves: {others}; the last life: {last}", flush=True)
    sys.exit(last)


main()

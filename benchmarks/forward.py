"""One evaluation of the PixArt transformer, beside diffusers' with the same weights: time, ratio,
FLOP/s, compile time, memory.

    python benchmarks/forward.py --px 256,512                        fp32 on a CPU: diffusers eager
    and compiled
    python benchmarks/forward.py --px 512,1024ms --batch 1,16        on a GPU: bfloat16, diffusers
    compiled
    python benchmarks/forward.py --model tiny --px 64 --repeat 2     to see it work

Both sides open the same random weights (made once, under $PIXART_JAX_CACHE) and run by turns, each
in a process of its own. Exit status 1 where a side failed or fp32 outputs differ by more than 1e-4.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import command  # noqa: E402
from pixart_jax import cli  # noqa: E402


def main(argv: list[str]) -> int:
    flags = command.begin(argv, command.parser(__doc__, px="256,512", repeat=7))
    if flags.table:
        return command.show(flags.table)
    of, contenders = command.cases("forward", flags), [command.ours(), *command.peers(flags)]
    return command.run(
        argv,
        flags,
        of,
        contenders,
        command.rules(flags, command.alone(flags, of, contenders, 4)),
        command.within({"output": 1e-4}),
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))

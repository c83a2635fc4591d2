"""One evaluation of the PixArt transformer, beside diffusers' with the same weights.

    python benchmarks/forward.py --px 256,512                        on a CPU: fp32
    python benchmarks/forward.py --px 512,1024ms --batch 1,16        on a GPU: bfloat16
    python benchmarks/forward.py --model tiny --px 64 --repeat 2     a rehearsal
    python benchmarks/forward.py --px 512 --controlnet CHECKOUT      under a ControlNet

Measures time, FLOP/s, compile time and memory. Both sides open the same random weights and run by
turns, each in its own process. Exit status 1 where a side failed or fp32 outputs differ by more
than 1e-4.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import command  # noqa: E402
from pixart_jax import cli  # noqa: E402


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, px="256,512", repeat=7)
    checkout = "of huggingface/diffusers, whose research code is the peer"
    parser.add_argument("--controlnet", type=Path, metavar="CHECKOUT", help=checkout)
    flags = command.begin(argv, parser)
    kind = "control" if flags.controlnet else "forward"
    contenders = [command.ours(), *command.peers(flags, checkout=str(flags.controlnet))]
    return command.run(argv, flags, command.cases(kind, flags), contenders, {"output": 1e-4})


if __name__ == "__main__":
    sys.exit(cli.run(main))

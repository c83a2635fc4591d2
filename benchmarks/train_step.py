"""A train step (forward, backward, clip, AdamW, EMA) beside PyTorch with diffusers' model, the same
weights and the same first batch.

    python benchmarks/train_step.py --px 256                                  fp32 on a CPU:
    diffusers eager and compiled
    python benchmarks/train_step.py --px 256,512,1024ms --batch 32            on a GPU: bfloat16
    over fp32 masters
    python benchmarks/train_step.py --px 256 --remat all --against none       time and memory of
    each policy of models/remat.py
    python benchmarks/train_step.py --px 1024ms --largest-batch               on a GPU: the largest
    batch that fits, and its step
    python benchmarks/train_step.py --compile-time                            the step's compile
    time, cold and from the cache
    python benchmarks/train_step.py --model tiny --px 64 --repeat 2           to see it work

Ours is the step that train.py runs. The peer's model checkpoints each block where our remat is not
'none' (--peer-checkpointing); AdamW is torch's fused one, the loss is written out in
benchmarks/speed/peer_training.py. Loss and gradient norm of the first step are compared: exit
status 1 where a side failed or, in fp32, the losses differ by more than 1e-4 or the norms by more
than 1e-3. XL/2 in fp32 takes about 12 GiB a side at batch 1; where all sides together do not fit,
each runs alone, one after the other. Our process has the huge pages that train.py gives itself on a
CPU (pixart_jax/training/huge_pages.py), the peer's has what PyTorch comes with (--huge-pages).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import command, compile_time, largest_batch  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.models import remat  # noqa: E402
from pixart_jax.training import huge_pages  # noqa: E402

# relative, in fp32; torch's norm on a CPU adds up millions of squares one by one
BOUNDS = {"loss": 1e-4, "grad_norm": 1e-3}
STATE = 20  # bytes a parameter: master, gradient, two moments, EMA


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, px="256", repeat=5)
    parser.add_argument(
        "--remat",
        default="full",
        metavar="NAMES",
        help=f"of {', '.join(remat.NAMES)}, with commas between, or all",
    )
    parser.add_argument(
        "--peer-checkpointing",
        choices=("auto", "yes", "no"),
        default="auto",
        help="auto: unless remat is none",
    )
    parser.add_argument(
        "--huge-pages",
        choices=("ours", "both", "none"),
        default="ours",
        help="on a CPU, whose processes ask malloc for them",
    )
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="what the device's memory holds; --batch is the first guess",
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="of --largest-batch, instead of the device's"
    )
    parser.add_argument(
        "--compile-time",
        action="store_true",
        help="measure that alone: cold and from the persistent cache",
    )
    flags = command.begin(argv, parser)
    if flags.table:
        return command.show(flags.table)
    policies = list(remat.NAMES) if flags.remat == "all" else flags.remat.split(",")
    for name in policies:
        remat.policy(name)
    if flags.remat == "all" and command.platform() == "cpu":
        policies.remove("offload")
        command.tell("offload is left out: a CPU has no other memory to offload to")
    of: Iterable = command.cases("train", flags)
    if flags.compile_time:
        return compile_time.measure(
            argv, flags, [(case, {"remat": name}) for case in of for name in policies]
        )
    if flags.largest_batch:
        if len(policies) != 1:
            raise UserError("--largest-batch is of one --remat")
        memory = None if flags.memory is None else flags.memory * 2**30
        of = (
            dataclasses.replace(
                case, batch=largest_batch.search(case, policies[0], command.tell, memory)
            )
            for case in of
        )
    checkpointing = flags.peer_checkpointing == "yes" or (
        flags.peer_checkpointing == "auto" and policies != ["none"]
    )
    suffix = ", checkpointing" if checkpointing else ""
    contenders = [command.ours(f"remat {name}", remat=name) for name in policies]
    contenders += command.peers(flags, {"checkpointing": checkpointing}, suffix)
    with_pages = {"ours": ("ours",), "both": ("ours", "peer"), "none": ()}[flags.huge_pages]
    pages = tuple(huge_pages.here().items())
    contenders = [
        dataclasses.replace(one, env=pages) if one.side in with_pages else one for one in contenders
    ]
    lonely = flags.largest_batch or command.alone(flags, of, contenders, STATE)
    return command.run(
        argv, flags, of, contenders, command.rules(flags, lonely), command.within(BOUNDS)
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""A train step (forward, backward, clip, AdamW, EMA) beside PyTorch with diffusers' model.

    python benchmarks/train_step.py --px 256                               on a CPU: fp32
    python benchmarks/train_step.py --px 256,512,1024ms --batch 32         on a GPU: bfloat16
    python benchmarks/train_step.py --px 256 --remat all --against none    each remat policy
    python benchmarks/train_step.py --px 1024ms --largest-batch            the largest batch
    python benchmarks/train_step.py --compile-time                         cold and from the cache
    python benchmarks/train_step.py --model tiny --px 64 --repeat 2        a rehearsal

Both sides have the same weights and first batch. Ours is the step that train.py runs; the peer
checkpoints each block where our remat is not 'none' (--peer-checkpointing). Exit status 1 where a
side failed or, in fp32, the first losses differ by more than 1e-4 or the gradient norms by more
than 1e-3. XL/2 in fp32 takes about 12 GiB a side at batch 1, so on a CPU each side runs alone, one
after the other, unless --alone no.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import command, compiled  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.models import remat  # noqa: E402

# relative, in fp32; torch's norm on a CPU adds up millions of squares one by one
BOUNDS = {"loss": 1e-4, "grad_norm": 1e-3}


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, px="256", repeat=5)
    add = parser.add_argument
    add("--remat", default="full", metavar="NAMES", help=f"of {', '.join(remat.NAMES)}; or all")
    add("--peer-checkpointing", choices=("auto", "yes", "no"), default="auto")
    add("--largest-batch", action="store_true", help="search it; --batch is the first guess")
    add("--memory", type=float, metavar="GIB", help="of --largest-batch: not the device's")
    flags = command.begin(argv, parser)
    policies = list(remat.NAMES) if flags.remat == "all" else flags.remat.split(",")
    for name in policies:
        remat.policy(name)
    if flags.remat == "all" and command.platform() == "cpu":
        policies.remove("offload")  # a CPU has no other memory to offload to
    measured = command.cases("train", flags)
    if flags.compile_time:
        pairs = [(case, {"remat": name}) for case in measured for name in policies]
        return compiled.compile_times(argv, flags, pairs)
    if flags.largest_batch and len(policies) != 1:
        raise UserError("--largest-batch takes one --remat")
    checkpointing = {"yes": True, "no": False}.get(flags.peer_checkpointing, policies != ["none"])
    suffix = ", checkpointing" if checkpointing else ""
    contenders = [command.ours(f"remat {name}", remat=name) for name in policies]
    contenders += command.peers(flags, suffix, checkpointing=checkpointing)
    search = lambda case: compiled.largest_batch(case, policies[0], flags.memory)  # noqa: E731
    prepare = search if flags.largest_batch else None
    return command.run(argv, flags, measured, contenders, BOUNDS, prepare)


if __name__ == "__main__":
    sys.exit(cli.run(main))

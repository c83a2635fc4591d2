"""All of sampling, 20 steps of DPM-Solver++ with guidance 4.5, beside diffusers'
PixArtAlphaPipeline with the same weights.

    python benchmarks/sample.py --px 256                             fp32 on a CPU: diffusers eager
    and compiled
    python benchmarks/sample.py --px 512,1024ms --batch 1,16         on a GPU: bfloat16, diffusers
    compiled
    python benchmarks/sample.py --px 1024ms --draw                   from prompts to PNG files, with
    T5-XXL and the VAE
    python benchmarks/sample.py --compile-time                       the sampler's compile time,
    cold and from the cache
    python benchmarks/sample.py --model tiny --px 64 --repeat 2      to see it work

Both sides are given the same text states, lengths and noise; the relative difference of their
latents stands in the last column, and exit status 1 says that a side failed or that fp32 latents
differ by more than 1e-3. In bfloat16 both sides round at each step. --options are ours alone,
shortcuts of pixart_jax/pipeline/shortcuts.py as JSON, {"blocks_every": 2}; then the latents are not
the same, and the last column says how far apart they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import command, compile_time  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.pipeline import CacheConfig  # noqa: E402


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, px="256", repeat=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument(
        "--draw",
        action="store_true",
        help="from prompts to PNG files; text encoder and VAE of random numbers",
    )
    parser.add_argument(
        "--options",
        default="{}",
        metavar="JSON",
        help="shortcuts (pixart_jax/pipeline/shortcuts.py)",
    )
    parser.add_argument(
        "--compile-time",
        action="store_true",
        help="measure that alone: cold and from the persistent cache",
    )
    flags = command.begin(argv, parser)
    if flags.table:
        return command.show(flags.table)
    of = command.cases(
        "draw" if flags.draw else "sample", flags, steps=flags.steps, guidance=flags.guidance
    )
    if flags.compile_time:
        return compile_time.measure(argv, flags, [(case, {}) for case in of])
    if flags.against != "none" and any(case.multi_scale and case.px != 1024 for case in of):
        raise UserError(
            "diffusers' pipeline tells a model the image's size at 1024 px alone: --px 1024ms, or "
            "512 and the like without ms"
        )
    try:
        options = json.loads(flags.options)
        CacheConfig(**options)
    except (ValueError, TypeError) as fault:
        raise UserError(f"--options {flags.options}: {fault}") from None
    contenders = [
        command.ours(
            "with shortcuts" if options else "", **({"shortcuts": options} if options else {})
        ),
        *command.peers(flags),
    ]
    check = command.within({"latents": float("inf") if options else 1e-3})
    return command.run(
        argv,
        flags,
        of,
        contenders,
        command.rules(flags, command.alone(flags, of, contenders, 4)),
        check,
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))

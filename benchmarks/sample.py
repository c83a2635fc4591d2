"""Sampling, 20 steps of DPM-Solver++ with guidance 4.5, beside diffusers' PixArtAlphaPipeline.

    python benchmarks/sample.py --px 256                             on a CPU: fp32
    python benchmarks/sample.py --px 512,1024ms --batch 1,16         on a GPU: bfloat16
    python benchmarks/sample.py --px 1024ms --draw                   from prompts to PNG files
    python benchmarks/sample.py --compile-time                       cold and from the cache
    python benchmarks/sample.py --model tiny --px 64 --repeat 2      a rehearsal

Both sides are given the same weights, text states, lengths and noise; exit status 1 where a side
failed or fp32 latents differ by more than 1e-3. In bfloat16 both sides round at each step.
--options are ours alone, fields of SamplingConfig as JSON, {"blocks_every": 2}; the latents
then differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed import command, compiled  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.pipeline import SamplingConfig  # noqa: E402


def main(argv: list[str]) -> int:
    parser = command.parser(__doc__, px="256", repeat=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--draw", action="store_true", help="from prompts to PNG files")
    parser.add_argument("--options", default="{}", metavar="JSON", help="fields of SamplingConfig")
    flags = command.begin(argv, parser)
    kind = "draw" if flags.draw else "sample"
    measured = command.cases(kind, flags, steps=flags.steps, guidance=flags.guidance)
    if flags.compile_time:
        return compiled.compile_times(argv, flags, [(case, {}) for case in measured])
    if flags.against != "none" and any(case.multi_scale and case.px != 1024 for case in measured):
        raise UserError(
            "diffusers' pipeline gives a model the image's size at 1024 px only: --px 1024ms, or "
            "512 and the like without ms"
        )
    try:
        options = json.loads(flags.options)
        SamplingConfig(**options)
    except (ValueError, TypeError) as error:
        raise UserError(f"--options {flags.options}: {error}") from None
    ours = command.ours("with options", sampling=options) if options else command.ours()
    bounds = {"latents": float("inf") if options else 1e-3}
    return command.run(argv, flags, measured, [ours, *command.peers(flags)], bounds)


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Prompts → PNGs.

    python sample.py --prompt "a large red star left of a small blue circle"
    python sample.py --model PATH --prompts prompts.txt --out out --steps 20 --guidance 4.5

A second call with the same settings draws only what is not there.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import sys
from pathlib import Path
from typing import Literal

from pixart_jax import program, prompts
from pixart_jax.errors import UserError

SHIPPED = Path(__file__).resolve().parent / "assets" / "shapes"
CANVAS = ("height", "width", "binning", "seed", "batch_size")
HOW = ("steps", "guidance", "solver", "times", "null")  # flags that say how to sample


@dataclasses.dataclass(frozen=True)
class Flags:
    """Draw prompts with a PixArt model. Images are PNGs that carry their settings; a second call draws only what is missing."""

    prompt: str | None = None
    """The text to draw."""
    prompts: Path | None = None
    """A file of prompts instead: one a line, or .csv or .jsonl with 'prompt', and height, width, seed, negative_prompt if wanted."""
    model: Path = SHIPPED
    """A diffusers folder; by default the small model that is shipped."""
    out: Path = Path("out")
    """The folder for the images."""
    negative_prompt: str = ""
    """What to steer away from."""
    steps: int | None = None
    """Evaluations of the model an image. By default the model's own, 20 where it names none."""
    guidance: float | None = None
    """Strength of the prompt; 1 does no second pass. By default the model's own, 4.5 where it names none."""
    height: int | None = None
    """Pixels; by default the side the model was trained at."""
    width: int | None = None
    """Pixels; by default the side the model was trained at."""
    seed: int = 0
    """The same seed gives the same images, whatever the batch."""
    solver: str | None = None
    """dpm++, ddim, ddpm, sa, lcm (distilled models, 4 steps) or dmd (1 step). By default the model's own."""
    times: Literal["fractional", "integer"] = "fractional"
    """The time grid of dpm++: the official code's, or diffusers'."""
    null: Literal["text", "embedding"] = "text"
    """What an empty negative prompt means: the text encoder's states of "", or the model's null caption (the official code)."""
    clean_caption: bool = True
    """Clean prompts as PixArt's training captions were: addresses, markup, file names and the like go."""
    binning: bool = True
    """Draw at the nearest size that the model was trained at, then resize and cut to what was asked for."""
    batch_size: int | None = None
    """Images at once; by default up to 16 a device."""
    vae_tile: int | None = None
    """Decode large images in blended tiles of so many latents a side (64 is 512 pixels)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; auto: bfloat16 on accelerators."""
    grid: bool = True
    """Also write grid.png where there is more than one prompt."""


def main(argv: list[str]) -> int:
    flags = program.parse(Flags, argv, prog="sample.py")
    wanted = read_prompts(flags)
    drawings = plan(flags, wanted)
    if drawings.missing:
        draw(flags, drawings)
    done = len(wanted) - len(drawings.missing)
    print(f"{len(wanted)} image{'s' * (len(wanted) > 1)} in {flags.out}/" + (f", {done} of them already there" if done else ""))
    if len(wanted) == 1:
        print(drawings.paths[0])
    elif flags.grid:
        print(drawings.write_grid())
    return 0


def read_prompts(flags: Flags) -> list[prompts.Row]:
    if (flags.prompt is None) == (flags.prompts is None):
        raise UserError("give --prompt TEXT or --prompts FILE" + (", not both" if flags.prompt is not None else ""))
    return prompts.read(flags.prompts) if flags.prompt is None else [prompts.Row(flags.prompt)]


def plan(flags: Flags, rows: list[prompts.Row]):
    """What is to be drawn, and what of it is there. All flags and rows are checked here, before the weights are read."""
    from pixart_jax.pipeline import drawings, folder, options, sampling

    configs = folder.configs(flags.model)
    steps, guidance, solver = sampling.read(flags.model).filled(flags.steps, flags.guidance, flags.solver)
    flags = dataclasses.replace(flags, steps=steps, guidance=guidance, solver=solver)
    checked = {name: getattr(flags, name) for name in (*CANVAS, *HOW)} | {"tile": flags.vae_tile}
    settings = {
        "negative_prompt": flags.negative_prompt,
        "height": None,
        "width": None,
        "seed": flags.seed,
        **{name: getattr(flags, name) for name in HOW},
        **({"vae_tile": flags.vae_tile} if flags.vae_tile else {}),
        **{name: False for name in ("clean_caption", "binning") if not getattr(flags, name)},
        "dtype": dtype(flags).__name__,
        "model": flags.model.resolve().name,
        "model_hash": drawings.model_hash(flags.model),
    }

    @functools.cache
    def size(own: tuple) -> tuple[int, int]:
        return options.check(*configs, **checked | dict(own))

    wanted = []
    for n, row in enumerate(rows):
        own = row.own()
        try:
            height, width = size(tuple((name, value) for name, value in own.items() if name in CANVAS))
        except UserError as fault:
            raise UserError(f"prompt {n + 1}, {row.prompt[:40]!r}: {fault}" if own else str(fault)) from None
        wanted.append({"prompt": row.prompt, "index": n, **settings, **own, "height": height, "width": width})
    return drawings.Drawings(flags.out, wanted)


def dtype(flags: Flags):
    import jax
    import jax.numpy as jnp

    chosen = ("float32" if jax.default_backend() == "cpu" else "bfloat16") if flags.dtype == "auto" else flags.dtype
    return jnp.dtype(chosen).type


def draw(flags: Flags, drawings) -> None:
    """Draw what is missing, the images of one size and seed together; a thread writes files while the device draws on."""
    import jax
    from tqdm import tqdm

    from pixart_jax import Pipeline
    from pixart_jax.config import MeshConfig
    from pixart_jax.parallel.mesh import make_mesh

    pipe = Pipeline.from_pretrained(flags.model, dtype=dtype(flags), mesh=make_mesh(MeshConfig()) if jax.device_count() > 1 else None)
    groups: dict[tuple, list[int]] = {}
    for n in drawings.missing:
        groups.setdefault(tuple(drawings.wanted[n][name] for name in ("height", "width", "seed")), []).append(n)
    with (
        tqdm(total=len(drawings.missing), unit=" images", desc="drawing (compiles first)") as bar,
        concurrent.futures.ThreadPoolExecutor(1) as writer,
    ):
        written: list[concurrent.futures.Future] = []
        for (height, width, seed), members in groups.items():
            batches = pipe.draw(
                [drawings.wanted[n]["prompt"] for n in members],
                negative_prompt=[drawings.wanted[n]["negative_prompt"] for n in members],
                indices=members,
                height=height,
                width=width,
                seed=seed,
                tile=flags.vae_tile,
                **{name: getattr(flags, name) for name in ("clean_caption", "binning", "batch_size", *HOW)},
            )
            for positions, images in batches:
                for done in written:  # of the batch before: at most two are in memory, and a full disk stops the drawing
                    done.result()
                written = [writer.submit(drawings.write, members[p], image) for p, image in zip(positions, images, strict=True)]
                bar.update(len(positions))
                bar.set_description("drawing")
        for done in written:
            done.result()


if __name__ == "__main__":
    sys.exit(program.run(main))

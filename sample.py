"""Prompts → PNGs.

    python sample.py --prompt "a large red star left of a small blue circle"
    python sample.py --model PATH --prompts prompts.txt --out out --steps 20 --guidance 4.5

A second call with the same settings draws only what is not there.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Literal

from pixart_jax import cli
from pixart_jax.errors import UserError
from pixart_jax.files import bundled
from pixart_jax.text import PromptRow, read_prompts

SHIPPED = bundled("assets") / "shapes"
CANVAS = ("height", "width", "binning", "seed", "batch_size")
# images/s, however slow
BAR = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, "
    "{rate_noinv_fmt}]"
)
HOW = ("steps", "guidance", "solver", "times", "null")  # flags that say how to sample


@dataclasses.dataclass(frozen=True)
class Flags:
    """Draw prompts with a PixArt model. Images are PNGs that carry their settings; a second call
    draws only what is missing."""

    prompt: str | None = None
    """The text to draw."""
    prompts: Path | None = None
    """A file of prompts instead: one a line, or .csv or .jsonl with 'prompt', and height, width,
    seed, negative_prompt if wanted."""
    model: Path = SHIPPED
    """A diffusers folder; by default the small model that is shipped."""
    out: Path = Path("out")
    """The folder for the images."""
    negative_prompt: str = ""
    """What to steer away from."""
    steps: int | None = None
    """Evaluations of the model an image. By default the model's own, 20 where it names none."""
    guidance: float | None = None
    """Strength of the prompt; 1 does no second pass. By default the model's own, 4.5 where it names
    none."""
    height: int | None = None
    """Pixels; by default the side the model was trained at."""
    width: int | None = None
    """Pixels; by default the side the model was trained at."""
    seed: int = 0
    """The same seed gives the same images, whatever the batch."""
    solver: str | None = None
    """dpm++, ddim, ddpm, sa, lcm (distilled models, 4 steps) or dmd (1 step). By default the
    model's own."""
    times: Literal["fractional", "integer"] = "fractional"
    """The time grid of dpm++: the official code's, or diffusers'."""
    null: str = "auto"
    """What an empty negative prompt means: text, the text encoder's states of "", or embedding, the
    model's null caption (the official code); auto: as the model says, text where it says
    nothing."""
    clean_caption: bool = True
    """Clean prompts as PixArt's training captions were: addresses, markup, file names and the like
    go."""
    binning: bool = True
    """Draw at the nearest size that the model was trained at, then resize and cut to what was asked
    for."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these two times (0 … 999); a step outside costs half. This and the next
    three change the image: docs/speed.md."""
    cross_attention_steps: int | None = None
    """After so many steps keep what cross-attention last gave and end guidance."""
    blocks_every: int = 1
    """Compute the blocks at every N-th step alone, and between them add what they last gave."""
    block_schedule: str | None = None
    """A JSON file that says for each step, block and part (attention, cross-attention, MLP) whether
    it is computed, 1 or 0."""
    batch_size: int | None = None
    """Images at once; by default up to 16 a device."""
    vae_tile: int | None = None
    """Decode large images in blended tiles of so many latents a side (64 is 512 pixels)."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: bfloat16 on accelerators."""
    text_states: Path | None = None
    """A file of `python -m pixart_jax encode --prompts`: drawn from without opening the text
    encoder."""
    offload_text_encoder: str = "auto"
    """always: encode all texts first and delete the text encoder from the devices before the rest
    of the model is opened; never;
    auto: where not all would fit together. The images are the same."""
    text_encoder_int8: bool = False
    """Hold the text encoder's matrices as int8 values: half of bfloat16's memory, and states that
    differ by 1 to 2 %."""
    weights_cache: str = "auto"
    """A folder where large weights are kept as they lie in memory, so that the next start is quick;
    auto: one in $PIXART_JAX_CACHE (~/.cache/pixart_jax); none."""
    mesh: str = "data=-1"
    """How this process's devices split the work: data=N copies of the model, each drawing its part
    of a batch, fsdp=N and tensor=N parts that the parameters are cut into, context=N the parts that
    an image's tokens are; -1: the rest. With commas between: fsdp=4,tensor=2. Where half as many
    images as data × fsdp are drawn, each one's two halves of guidance are computed side by side."""
    share: str | None = None
    """K/N: this process draws share K (from 0) of N into the same folder; cluster: as JAX detects
    (Cloud TPU, GKE, SLURM). By default all, or what `python -m pixart_jax launch` says."""
    grid: bool = True
    """Also write grid.png where there is more than one prompt."""


def main(argv: list[str]) -> int:
    from pixart_jax.pipeline import shares

    flags = cli.parse(Flags, argv, prog="sample.py")
    wanted = prompt_rows(flags)
    share = shares.parse(flags.share)
    drawings = plan(flags, wanted, share)
    if drawings.missing:
        draw(flags, drawings)
    done, all_mine = len(drawings.mine) - len(drawings.missing), len(drawings.mine)
    whose = f" (share {share.index}/{share.count} of {len(wanted)})" if share.count > 1 else ""
    print(
        f"{all_mine} image{'s' * (all_mine != 1)} in {flags.out}/{whose}"
        + (f", {done} of them already there" if done else "")
    )
    if len(wanted) == 1 and drawings.paths:
        print(drawings.paths[0])
    elif len(wanted) > 1 and flags.grid and share.index == 0:
        await_others(drawings)
        print(drawings.write_grid())
    return 0


def prompt_rows(flags: Flags) -> list[PromptRow]:
    if (flags.prompt is None) == (flags.prompts is None):
        raise UserError(
            "give --prompt TEXT or --prompts FILE"
            + (", not both" if flags.prompt is not None else "")
        )
    return read_prompts(flags.prompts) if flags.prompt is None else [PromptRow(flags.prompt)]


def plan(flags: Flags, rows: list[PromptRow], share):
    """What is to be drawn, and what of it is there. All that can be wrong is found here, before
    weights are read or a folder is made."""
    from pixart_jax.pipeline import drawings, folder, memory, options, sampling

    options.check_choice("dtype", flags.dtype, options.DTYPES)
    local_mesh(flags)
    options.check_choice("offload-text-encoder", flags.offload_text_encoder, memory.OFFLOADS)
    configs = folder.configs(flags.model)
    own = sampling.read(flags.model)
    steps, guidance, solver = own.with_defaults(flags.steps, flags.guidance, flags.solver)
    flags = dataclasses.replace(
        flags, steps=steps, guidance=guidance, solver=solver, null=own.resolve_null(flags.null)
    )
    asked = shortcuts(flags)
    checked = {name: getattr(flags, name) for name in (*CANVAS, *HOW)} | {
        "tile": flags.vae_tile,
        "shortcuts": asked,
    }
    settings = {
        "negative_prompt": flags.negative_prompt,
        "height": None,
        "width": None,
        "seed": flags.seed,
        **{name: getattr(flags, name) for name in HOW},
        **({"vae_tile": flags.vae_tile} if flags.vae_tile else {}),
        **asked.settings(),
        **{name: False for name in ("clean_caption", "binning") if not getattr(flags, name)},
        "dtype": dtype(flags).__name__,
        **(
            {"text_encoder": "int8"}
            if flags.text_encoder_int8 and flags.text_states is None
            else {}
        ),
        "model": flags.model.resolve().name,
        "model_hash": drawings.model_hash(flags.model),
    }

    @functools.cache
    def size(own: tuple) -> tuple[int, int]:
        return options.validate_options(*configs, **checked | dict(own))

    wanted = []
    for n, row in enumerate(rows):
        own = row.overrides()
        try:
            height, width = size(
                tuple((name, value) for name, value in own.items() if name in CANVAS)
            )
        except UserError as fault:
            raise UserError(
                f"prompt {n + 1}, {row.prompt[:40]!r}: {fault}" if own else str(fault)
            ) from None
        wanted.append(
            {"prompt": row.prompt, "index": n, **settings, **own, "height": height, "width": width}
        )
    if flags.text_states is not None:
        how = text_states(flags, wanted).precision(settings["dtype"])
        wanted = [{**image, **({"text_states": how} if how else {})} for image in wanted]
    folder.check_weights(flags.model, ("transformer", "vae") if flags.text_states else folder.PARTS)
    return drawings.OutputFolder(flags.out, wanted, share)


def shortcuts(flags: Flags):
    """What is left out to be faster."""
    from pixart_jax.pipeline import CacheConfig

    return CacheConfig(
        flags.guidance_interval,
        flags.cross_attention_steps,
        flags.blocks_every,
        flags.block_schedule,
    )


def text_states(flags: Flags, wanted: list[dict]):
    """The states of --text-states, which must be this model's and hold all that is wanted."""
    from pixart_jax.pipeline import TextStates
    from pixart_jax.pipeline.prompt_encoder import identity

    kept = TextStates.open(flags.text_states)
    made = identity(flags.model, dtype(flags), cleaning(flags))
    kept.check({name: value for name, value in made.items() if name != "computed_in"})
    kept.lengths(texts(flags, wanted), cleaning(flags))
    return kept


def texts(flags: Flags, images: list[dict]) -> list[str]:
    """All that the text encoder is to read for these images, once each."""
    from pixart_jax.pipeline.text_states import texts_to_encode

    how = images[0]
    prompts_, negatives = (
        [image[name] for image in images] for name in ("prompt", "negative_prompt")
    )
    return texts_to_encode(prompts_, negatives, how["guidance"], how["null"], cleaning(flags))


def cleaning(flags: Flags):
    from pixart_jax.text import caption_cleaner

    return caption_cleaner(flags.clean_caption)


def dtype(flags: Flags):
    import jax
    import jax.numpy as jnp

    chosen = (
        ("float32" if jax.default_backend() == "cpu" else "bfloat16")
        if flags.dtype == "auto"
        else flags.dtype
    )
    return jnp.dtype(chosen).type


def local_mesh(flags: Flags):
    """The mesh of this process's devices; None where it has but one."""
    import jax

    from pixart_jax.config import MeshConfig
    from pixart_jax.parallel.mesh import make_mesh

    mesh = make_mesh(MeshConfig.parse(flags.mesh), jax.local_devices())
    return mesh if mesh.size > 1 else None


def opened(flags: Flags) -> dict:
    """How the model is opened."""
    from pixart_jax.pipeline import options

    return {
        "quantization": "int8" if flags.text_encoder_int8 else None,
        "cache": options.weights_cache(flags.weights_cache),
    }


def draw(flags: Flags, drawings) -> None:
    """Draw what is missing, the images of one size and seed together; threads write files while the
    devices draw on."""
    from tqdm import tqdm

    from pixart_jax import Pipeline
    from pixart_jax.config import MeshConfig
    from pixart_jax.pipeline.writer import AsyncWriter

    mesh = local_mesh(flags)
    states = encoded(flags, [drawings.wanted[n] for n in drawings.missing], mesh)
    pipe = Pipeline.from_pretrained(
        flags.model, dtype(flags), mesh, text_encoder=states is None, **opened(flags)
    )
    pipe = pipe.replace(context_attention=MeshConfig.parse(flags.mesh).context_attention)
    quiet = drawings.share.index > 0
    with (
        tqdm(
            total=len(drawings.missing),
            unit=" images",
            bar_format=BAR,
            desc="drawing (compiles first)",
            disable=quiet,
        ) as bar,
        AsyncWriter(drawings.write) as writer,
    ):
        for members in drawings.groups():
            images = [drawings.wanted[n] for n in members]
            batches = pipe.generate(
                [image["prompt"] for image in images],
                negative_prompt=[image["negative_prompt"] for image in images],
                indices=members,
                text_states=states,
                tile=flags.vae_tile,
                shortcuts=shortcuts(flags),
                **{name: images[0][name] for name in ("height", "width", "seed", *HOW)},
                **{
                    name: getattr(flags, name)
                    for name in ("clean_caption", "binning", "batch_size")
                },
            )
            for positions, drawn in batches:
                for position, image in zip(positions, drawn, strict=True):
                    writer.put(members[position], image)
                bar.update(len(positions))
                bar.set_description("drawing")


def encoded(flags: Flags, images: list[dict], mesh):
    """The text states of the images where the text encoder is not to lie beside the rest of the
    model; None where it is."""
    from tqdm import tqdm

    from pixart_jax.pipeline import PromptEncoder, TextStates, memory

    if flags.text_states is not None:
        return TextStates.open(flags.text_states)  # checked when the work was planned
    if flags.offload_text_encoder == "never":
        return None
    if flags.offload_text_encoder == "auto" and not memory.should_offload(
        flags.model, dtype(flags), mesh, opened(flags)["quantization"]
    ):
        return None
    encoder = PromptEncoder.from_pretrained(flags.model, dtype(flags), mesh, **opened(flags))
    wanted = texts(flags, images)
    with tqdm(total=len(wanted), unit=" prompts", bar_format=BAR, desc="encoding") as bar:
        states = encoder.states(wanted, dtype(flags).__name__, cleaning(flags), told=bar.update)
    encoder.free()
    return states


def await_others(drawings) -> None:
    """Wait for what the other shares draw, which the sheet shows too."""
    from tqdm import tqdm

    others = len(drawings.wanted) - len(drawings.mine)
    if others:
        with tqdm(
            total=others, unit=" images", desc="waiting for the other shares (ctrl-C leaves)"
        ) as bar:
            drawings.wait(bar.update)


if __name__ == "__main__":
    sys.exit(cli.run(main))

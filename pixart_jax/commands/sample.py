"""Prompts → PNGs, from the command line to the last file.

    python sample.py --prompt "a large red star left of a small blue circle"
    python sample.py --model PATH --prompts prompts.txt --out out --steps 20 --guidance 4.5

A second call with the same settings generates only what is missing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from pixart_jax import cli
from pixart_jax.commands.sample_flags import BAR, Flags
from pixart_jax.commands.sample_settings import image_settings
from pixart_jax.config import MeshConfig
from pixart_jax.pipeline import lora_flags


def main(argv: Sequence[str]) -> int:
    """All that the user can get wrong is found before weights are read or a folder is made."""
    flags = cli.parse(Flags, argv, prog="sample.py")
    rows = flags.prompt_rows()

    from pixart_jax.pipeline import output
    from pixart_jax.pipeline.folder import OFFLOADS, PARTS, ModelFolder
    from pixart_jax.pipeline.sampling_config import check_choice

    share, opening = output.parse_share(flags.share), flags.opening()
    check_choice("offload-text-encoder", flags.offload_text_encoder, OFFLOADS)
    parts = ("transformer", "vae") if flags.text_states else PARTS
    model = ModelFolder.open(flags.model, parts, variant=flags.variant)
    sampling = flags.sampling.with_defaults(model.sampling)
    sampling = flags.edits.sampling(sampling, model.transformer)
    flags = dataclasses.replace(flags, sampling=sampling)
    adapters = flags.loras.read(model.transformer)
    recorded = lora_flags.settings(adapters)
    wanted = [image | recorded for image in image_settings(flags, model, rows, opening)]
    wanted = flags.walks.frames(wanted)
    folder = output.OutputFolder(flags.out, wanted, share)
    if folder.missing:
        generate(flags, model, folder, opening, adapters)

    mine, done = len(folder.mine), len(folder.mine) - len(folder.missing)
    whose = f" (share {share.index}/{share.count} of {len(wanted)})" if share.count > 1 else ""
    there = f", {done} of them already there" if done else ""
    print(f"{mine} image{'s' * (mine != 1)} in {flags.out}/{whose}{there}")
    if len(wanted) == 1 and folder.paths:
        print(folder.paths[0])
    elif len(wanted) > 1 and (flags.grid or flags.walks.walk) and share.index == 0:
        others = len(wanted) - mine
        waiting = "waiting for the other shares (ctrl-C leaves)"
        with tqdm(total=others, unit=" images", desc=waiting, disable=not others) as bar:
            folder.wait(bar.update)
        print(folder.write_grid() if flags.walks.walk is None else flags.walks.write(folder))
    return 0


def generate(flags: Flags, model, folder, opening: dict[str, Any], adapters: list) -> None:
    """Generate what is missing, images of one size together; threads write the files. Raises
    UserError, after writing the others, for images that are not finite."""
    from pixart_jax.commands.sample_edits import edit_options
    from pixart_jax.commands.sample_texts import encode_first
    from pixart_jax.finite import NotFinite, not_written
    from pixart_jax.pipeline.output import AsyncWriter
    from pixart_jax.pipeline.pipeline import Pipeline

    bad: list[int] = []
    states = encode_first(flags, model, [folder.wanted[n] for n in folder.missing], opening)
    opening = {**opening, "controlnet": flags.edits.controlnet}
    pipe = Pipeline.from_pretrained(model, text_encoder=states is None, **opening)
    pipe = pipe.replace(context_attention=MeshConfig.parse(flags.mesh).context_attention)
    lora_flags.load(pipe, adapters)
    quiet, many, desc = folder.share.index > 0, len(folder.missing), "sampling (compiles first)"
    bar = tqdm(total=many, unit=" images", bar_format=BAR, desc=desc, disable=quiet)
    with bar, AsyncWriter(folder.write) as writer:
        for members in folder.groups():
            images = [folder.wanted[n] for n in members]
            batches = pipe.generate(
                [image["prompt"] for image in images],
                flags.sampling,
                negative_prompt=[image["negative_prompt"] for image in images],
                height=images[0]["height"],
                width=images[0]["width"],
                seed=[image["seed"] for image in images],
                guidance=[image["guidance"] for image in images],
                batch_size=flags.batch_size,
                indices=[image["index"] for image in images],
                text_states=states,
                **edit_options(images),
            )
            try:
                for positions, batch in batches:
                    for position, image in zip(positions, batch, strict=True):
                        writer.put(members[position], image)
                    bar.update(len(positions))
                    bar.set_description("sampling")
            except NotFinite as error:
                bad += [members[position] for position in error.indices]
    if bad:
        raise not_written([folder.wanted[n] for n in sorted(bad)], many)

"""Prompts → PNGs, from the command line to the last file.

    python sample.py --prompt "a large red star left of a small blue circle"
    python sample.py --model PATH --prompts prompts.txt --out out --steps 20 --guidance 4.5

A second call with the same settings generates only what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from pixart_jax import cli
from pixart_jax.commands import sample_lora
from pixart_jax.commands.sample_flags import BAR, Flags
from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.text import PromptRow


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
    flags = dataclasses.replace(flags, sampling=sampling)
    adapters = flags.loras.read(model.transformer)
    recorded = sample_lora.settings(adapters)
    wanted = [image | recorded for image in image_settings(flags, model, rows, opening)]
    folder = output.OutputFolder(flags.out, wanted, share)
    if folder.missing:
        generate(flags, model, folder, opening, adapters)

    mine, done = len(folder.mine), len(folder.mine) - len(folder.missing)
    whose = f" (share {share.index}/{share.count} of {len(wanted)})" if share.count > 1 else ""
    there = f", {done} of them already there" if done else ""
    print(f"{mine} image{'s' * (mine != 1)} in {flags.out}/{whose}{there}")
    if len(wanted) == 1 and folder.paths:
        print(folder.paths[0])
    elif len(wanted) > 1 and flags.grid and share.index == 0:
        others = len(wanted) - mine
        waiting = "waiting for the other shares (ctrl-C leaves)"
        with tqdm(total=others, unit=" images", desc=waiting, disable=not others) as bar:
            folder.wait(bar.update)
        print(folder.write_grid())
    return 0


def image_settings(
    flags: Flags, model, rows: Sequence[PromptRow], opening: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each image's settings, as its PNG records them. Raises UserError for options, text states or
    weights that this model cannot be sampled with."""
    from pixart_jax.commands.sample_texts import open_states
    from pixart_jax.pipeline.image_size import check_options
    from pixart_jax.pipeline.sampling_config import check_seed

    parts = model.transformer, model.vae, model.scheduler
    dtype = opening["dtype"].__name__
    common = {
        "negative_prompt": flags.negative_prompt,
        "height": flags.height,
        "width": flags.width,
        "seed": flags.seed,
        **flags.sampling.settings(),
        "dtype": dtype,
        **({"text_encoder": "int8"} if flags.text_encoder_int8 and not flags.text_states else {}),
        "model": model.name,
        "model_hash": model.fingerprint("transformer"),
    }

    @functools.cache
    def size(height: int | None, width: int | None, guidance: float) -> dict[str, int]:
        config, sides = dataclasses.replace(flags.sampling, guidance=guidance), (height, width)
        found = check_options(config, *parts, *sides, batch_size=flags.batch_size)
        return dict(zip(("height", "width"), found.asked))

    wanted = []
    for n, row in enumerate(rows):
        own = row.overrides()
        image = {"prompt": row.prompt, "index": n, **common, **own}
        try:
            seed = check_seed(image["seed"])
            image |= size(image["height"], image["width"], image["guidance"])
        except UserError as error:
            where = f"prompt {n + 1}, {row.prompt[:40]!r}: " if own else ""
            raise UserError(f"{where}{error}") from None
        seeds = ((seed + k) % 2**64 for k in range(flags.num_images_per_prompt))
        wanted += [{**image, "seed": own} for own in seeds]
    if flags.text_states is None:
        model.check_weights()
        return wanted
    model.check_weights(("transformer", "vae"))
    precision = open_states(flags, model, wanted, opening["dtype"]).precision(dtype)
    return [image | ({"text_states": precision} if precision else {}) for image in wanted]


def generate(flags: Flags, model, folder, opening: dict[str, Any], adapters: list) -> None:
    """Generate what is missing, images of one size together; threads write the files. Raises
    UserError, after writing the others, for images that are not finite."""
    from pixart_jax.commands.sample_texts import encode_first
    from pixart_jax.finite import NotFinite, not_written
    from pixart_jax.pipeline.output import AsyncWriter
    from pixart_jax.pipeline.pipeline import Pipeline

    bad: list[int] = []
    states = encode_first(flags, model, [folder.wanted[n] for n in folder.missing], opening)
    pipe = Pipeline.from_pretrained(model, text_encoder=states is None, **opening)
    pipe = pipe.replace(context_attention=MeshConfig.parse(flags.mesh).context_attention)
    sample_lora.load(pipe, adapters)
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

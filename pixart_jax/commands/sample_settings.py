"""What sample.py is to generate: each image's settings, checked before anything is opened."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from pixart_jax.commands.sample_edits import ROW_FIELDS, edits_of
from pixart_jax.commands.sample_flags import Flags
from pixart_jax.errors import UserError
from pixart_jax.text import PromptRow


def image_settings(
    flags: Flags, model, rows: Sequence[PromptRow], opening: dict[str, Any]
) -> list[dict[str, Any]]:
    """Each image's settings, as its PNG records them. Raises UserError for options, text states or
    weights that this model cannot be sampled with."""
    from pixart_jax.commands.sample_texts import open_states
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
    def size(guidance: float, height: int | None, width: int | None, *edit) -> dict[str, int]:
        config, edits = dataclasses.replace(flags.sampling, guidance=guidance), edits_of(dict(edit))
        found = edits.size(config, *parts, height, width, flags.batch_size)
        return edits.result_size(*found.asked)

    wanted = []
    for n, row in enumerate(rows):
        own = row.overrides()
        image = {"prompt": row.prompt, "index": n, **common, **own}
        try:
            seed = check_seed(image["seed"])
            edit = flags.edits.settings({name: image.pop(name, None) for name in ROW_FIELDS})
            sides = image["guidance"], image["height"], image["width"]
            image |= size(*sides, *edit.items()) | edit
        except UserError as error:
            where = f"prompt {n + 1}, {row.prompt[:40]!r}: " if own else ""
            raise UserError(f"{where}{error}") from None
        seeds = ((seed + k) % 2**64 for k in range(flags.num_images_per_prompt))
        wanted += [{**image, "seed": own} for own in seeds]
    if (path := flags.edits.controlnet) is not None:
        from pixart_jax.weights.component import controlnet_of

        if not all("control" in image for image in wanted):
            raise UserError(
                f"--controlnet {path} needs --control for every prompt, what it follows"
            )
        controlnet_of(path, model.transformer)
    if flags.text_states is None:
        model.check_weights()
        return wanted
    model.check_weights(("transformer", "vae"))
    precision = open_states(flags, model, wanted, opening["dtype"]).precision(dtype)
    return [image | ({"text_states": precision} if precision else {}) for image in wanted]

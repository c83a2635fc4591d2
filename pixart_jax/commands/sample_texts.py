"""The texts of a call of sample.py, encoded apart from the images: read from a file of
--text-states, or encoded first where the text encoder does not fit beside the rest of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pixart_jax.commands.sample_flags import BAR, Flags
from pixart_jax.pipeline import PromptEncoder, TextStates
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.pipeline.text_states import texts_to_encode
from pixart_jax.text import caption_cleaner


def texts(flags: Flags, images: Sequence[Mapping[str, Any]]) -> list[str]:
    """The distinct texts that these images are sampled from."""
    prompts = [image["prompt"] for image in images]
    prompts += [image["toward"] for image in images if "toward" in image]
    negatives = [image["negative_prompt"] for image in images if image["guidance"] != 1]
    clean = caption_cleaner(flags.sampling.clean_caption)
    return texts_to_encode(prompts, negatives, flags.sampling.null, clean)


def open_states(flags: Flags, model: ModelFolder, images: Sequence[Mapping[str, Any]], dtype):
    """The text states of --text-states. Raises UserError where they are another model's, or lack a
    text of the images."""
    states = TextStates.open(str(flags.text_states))
    clean = caption_cleaner(flags.sampling.clean_caption)
    identity = model.text_identity(dtype, clean)
    states.check({name: value for name, value in identity.items() if name != "computed_in"})
    states.lengths(texts(flags, images), clean)
    return states


def encode_first(flags: Flags, model: ModelFolder, images: Sequence[Mapping[str, Any]], opening):
    """The images' text states where the text encoder does not stay beside the rest of the model,
    else None."""
    from tqdm import tqdm

    if flags.text_states is not None:
        return open_states(flags, model, images, opening["dtype"])
    sizes = {name: opening[name] for name in ("dtype", "mesh", "quantization")}
    offload = flags.offload_text_encoder
    if offload == "never" or (offload == "auto" and not model.should_offload(**sizes)):
        return None
    encoder, wanted = PromptEncoder.from_pretrained(model, **opening), texts(flags, images)
    dtype, clean = opening["dtype"].__name__, caption_cleaner(flags.sampling.clean_caption)
    with tqdm(total=len(wanted), unit=" prompts", bar_format=BAR, desc="encoding") as bar:
        states = encoder.states(wanted, dtype, clean, on_progress=bar.update)
    encoder.free()
    return states

"""What a vision-language model is asked, with and without the raw caption: the paper's prompts, the
official script's, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence

from pixart_jax.errors import UserError

# name: (without a raw caption, with one)
PROMPTS = {
    "paper": (
        "Describe this image and its style in a very detailed manner",
        "Give the caption of this image '{caption}', describe this image and its style in a very "
        "detailed manner",
    ),
    "script": (  # of the released captioning script
        "Describe this image in a very detailed manner",
        'Given the caption of this image "{caption}", describe this image in a very detailed '
        "manner",
    ),
}
LONGEST_RAW = 8_000
"""Characters of a raw caption; a longer text would push the image out of the context."""


def template(prompt: str, with_raw: bool) -> str:
    """The text with '{caption}' where a raw caption belongs. prompt: a name of PROMPTS, or the
    text. Raises UserError where they disagree."""
    if prompt in PROMPTS:
        return PROMPTS[prompt][with_raw]
    if not prompt.strip():
        raise UserError("--prompt is empty: 'paper', 'script', or a text of your own")
    if with_raw != ("{caption}" in prompt):
        need = "has {caption}, so --raw-caption KIND is needed"
        if with_raw:
            need = "names --raw-caption KIND, so the prompt needs {caption}"
        raise UserError(f"--prompt {prompt!r} does not fit: the call {need}")
    return prompt


def fill(text: str, raw: str | None, special: Sequence[str] = ()) -> str:
    """The prompt of one image. The raw caption becomes one line, without the model's own special
    tokens ('<image>') and control characters."""
    if raw is None:
        return text
    for mark in special:
        raw = raw.replace(mark, " ")
    line = "".join(c if c.isprintable() else " " for c in raw)
    return text.replace("{caption}", " ".join(line.split()))

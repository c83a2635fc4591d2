"""What a vision-language model is asked: the paper's words, the official script's, or a person's
own, with and without the raw caption."""

from __future__ import annotations

from collections.abc import Sequence

from pixart_jax.errors import UserError

# name: (without a raw caption, with one). The paper's are those it prints; the script's those of
# the released captioning script.
PROMPTS = {
    "paper": (
        "Describe this image and its style in a very detailed manner",
        "Give the caption of this image '{caption}', describe this image and its style in a very "
        "detailed manner",
    ),
    "script": (
        "Describe this image in a very detailed manner",
        'Given the caption of this image "{caption}", describe this image in a very detailed '
        "manner",
    ),
}

MOST_RAW = 8_000
"""Characters of a raw caption that go into a prompt; a longer one is no caption and would push the
picture out of the context."""


def template(prompt: str, with_raw: bool) -> str:
    """The text with '{caption}' where a raw caption belongs. prompt: a name of PROMPTS, or the
    text. UserError where they disagree."""
    if prompt in PROMPTS:
        return PROMPTS[prompt][with_raw]
    if not prompt.strip():
        raise UserError("--prompt is empty: 'paper', 'script', or a text of your own")
    if with_raw != ("{caption}" in prompt):
        need = (
            "names --raw-caption KIND, so the prompt needs {caption}"
            if with_raw
            else "has {caption}, so --raw-caption KIND is needed"
        )
        raise UserError(f"--prompt {prompt!r} does not fit: the call {need}")
    return prompt


def fill(text: str, raw: str | None, special: Sequence[str] = ()) -> str:
    """The prompt of one picture. special: the model's own marks ('<image>'), which a raw caption
    must not be able to write."""
    return text if raw is None else text.replace("{caption}", plain_line(raw, special))


def plain_line(text: str, special: Sequence[str] = ()) -> str:
    """One line: marks, control characters and line breaks are blanks, and blanks are single."""
    for mark in special:
        text = text.replace(mark, " ")
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

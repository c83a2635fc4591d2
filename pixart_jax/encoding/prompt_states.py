"""Prompts → a file of text states, from which sample.py draws without the text encoder.

The work goes in parts, files of the very form of the result, which lie in a folder beside it until
all are there. So a kill costs one part, the same command goes on, and one with more prompts encodes
only those; the file is the one that an undisturbed run writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.pipeline import PromptEncoder, TextStates
from pixart_jax.pipeline.text_states import write
from pixart_jax.text import clean_caption

PART = 512  # texts, which is also what a kill can cost


def encode_prompt_file(
    texts: Sequence[str],
    out: Path,
    made: Mapping[str, str],
    encoder: Callable[[], PromptEncoder],
    *,
    clean: Callable[[str], str] = clean_caption,
    part: int = PART,
    progress: bool = True,
) -> int:
    """Have the states of all texts in ``out``; returns how many had to be encoded.

    made: the identity that the file is to carry, with cleaning and stored_in. encoder: opens the
    encoder, called only where something is missing. Texts that lie in the file already stay there.
    UserError where it was made otherwise.
    """
    wanted = list(dict.fromkeys(clean(text) for text in texts))
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = out.with_name(f".{out.name}.parts")
    with _alone(parts):
        known = _known(out, parts, made)
        missing = [text for text in wanted if text not in known]
        if missing:
            opened = encoder()
            bar = tqdm(
                total=len(wanted),
                initial=len(wanted) - len(missing),
                unit=" prompts",
                desc="encoding",
                disable=not progress,
            )
            with bar:
                for start in range(0, len(missing), part):
                    states = opened.states(
                        missing[start : start + part], made["stored_in"], str, bar.update
                    )
                    write(_free(parts), list(states), states, made)
            known = _known(out, parts, made)
        if missing or any(parts.glob("*.safetensors")):
            others = [text for text in _in_file(out, made) if text not in set(wanted)]
            write(out, [*wanted, *others], known, made)
        shutil.rmtree(parts, ignore_errors=True)
    return len(missing)


def _known(out: Path, parts: Path, made: Mapping[str, str]) -> Mapping:
    """States of every text in the file and its parts."""
    return ChainMap(*(_in_file(path, made) for path in (out, *sorted(parts.glob("*.safetensors")))))


def _in_file(path: Path, made: Mapping[str, str]) -> Mapping:
    if not path.exists():
        return {}
    states = TextStates.open(path)
    states.check(made)
    return states


def _free(parts: Path) -> Path:
    """The next part's file."""
    number = sum(1 for _ in parts.glob("*.safetensors"))
    return parts / f"{number:05d}.safetensors"


@contextlib.contextmanager
def _alone(parts: Path) -> Iterator[None]:
    """One run at a time on a file."""
    parts.mkdir(parents=True, exist_ok=True)
    with open(parts / "lock", "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another run encodes into "
                f"{parts.with_name(parts.name[1:].removesuffix('.parts'))}: wait for it"
            ) from None
        yield

"""Prompts → a file of text states, from which sample.py generates without the text encoder.

The work is written in parts, files of the result's own format in a folder beside it, until all
are there. A kill costs one part, the same command goes on, and one with more prompts encodes only
those; the file is the one that an undisturbed run writes.
"""

from __future__ import annotations

import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pixart_jax.errors import UserError
from pixart_jax.files import locked
from pixart_jax.pipeline import PromptEncoder, TextStates
from pixart_jax.pipeline.text_states import write
from pixart_jax.text import clean_caption

PART = 512  # texts, which is also the most that a kill can cost


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
    """Write the states of all texts to ``out``; return how many had to be encoded.

    made: the identity of the file, with cleaning and stored_in. encoder: opens the encoder, called
    only where a text is missing. Texts that are in the file already stay there. Raises UserError
    where the file has another identity, or another run is writing it.
    """
    wanted = list(dict.fromkeys(clean(text) for text in texts))
    parts = out.with_name(f".{out.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    busy = UserError(f"another run encodes into {out}: wait for it")
    with locked(parts / "lock", busy=busy):
        known = _known(out, parts, made)
        missing = [text for text in wanted if text not in known]
        done = len(wanted) - len(missing)
        if missing:
            opened = encoder()
            with tqdm(
                total=len(wanted),
                initial=done,
                unit=" prompts",
                desc="encoding",
                disable=not progress,
            ) as bar:
                for start in range(0, len(missing), part):
                    some = missing[start : start + part]
                    states = opened.states(some, made["stored_in"], str, bar.update)
                    number = len(list(parts.glob("*.safetensors")))
                    write(parts / f"{number:05d}.safetensors", list(states), states, made)
            known = _known(out, parts, made)
        if missing or any(parts.glob("*.safetensors")):
            others = [text for text in _states(out, made) if text not in set(wanted)]
            write(out, [*wanted, *others], known, made)
        shutil.rmtree(parts, ignore_errors=True)
    return len(missing)


def _known(out: Path, parts: Path, made: Mapping[str, str]) -> Mapping[str, np.ndarray]:
    """The states of every text in the file and its parts."""
    files = (out, *sorted(parts.glob("*.safetensors")))
    states: list[Any] = [_states(path, made) for path in files]
    return ChainMap(*states)


def _states(path: Path, made: Mapping[str, str]) -> Mapping[str, np.ndarray]:
    if not path.exists():
        return {}
    states = TextStates.open(path)
    states.check(made)
    return states

"""``encode --prompts``: prompts → a file of text states, from which sample.py generates without the
text encoder.

Parts, files of the result's format, are written to a folder beside it until all are there. A kill
costs one part; the same command resumes, and one with more prompts encodes only the new ones. The
file equals that of an uninterrupted run.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.files import locked
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.pipeline import PromptEncoder, TextStates
from pixart_jax.pipeline.folder import ModelFolder, compute_dtype, weights_cache
from pixart_jax.pipeline.text_states import write
from pixart_jax.remote_path import Location
from pixart_jax.text import caption_cleaner, clean_caption, notice_loss, read_prompts

PART = 512  # texts, which is also the most that a kill can cost


@dataclasses.dataclass(frozen=True)
class PromptArguments:
    """Prompts → a file of text states: sample.py --text-states needs no text encoder."""

    prompts: Location
    """One a line, or .csv or .jsonl with 'prompt' and 'negative_prompt', as sample.py reads them;
    "" is encoded too."""
    out: Path
    """The file, NAME.safetensors. Where it exists, only what is missing is encoded; so it is after
    a stop of any kind."""
    model: Location = Path("assets/shapes")
    """A model folder, as sample.py takes it."""
    variant: str | None = None
    """As sample.py's: of the model's weight files, such as fp16."""
    negative_prompt: str = ""
    """The one that sample.py will be given, if any."""
    stored: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the file: bfloat16, as a model reads them that computes in it, or float32, twice as
    large."""
    dtype: str = "auto"
    """Of the computation: float32 or bfloat16; auto: bfloat16 on accelerators."""
    mesh: str = "data=-1"
    """As sample.py's: fsdp=4,tensor=2 shards the parameters over the devices."""
    text_encoder_int8: bool = False
    """Hold the text encoder's matrices as int8 values: half of bfloat16's memory, and states that
    differ by 1 to 2 %."""
    weights_cache: str = "auto"
    """As sample.py's: a folder, auto or none."""
    clean_caption: bool = True
    """Clean prompts as sample.py does."""


def main(arguments: PromptArguments) -> int:
    """Encode the texts of a prompt file; return exit status 0."""
    out, dtype = arguments.out, compute_dtype(arguments.dtype)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: a file NAME.safetensors is needed")
    rows = read_prompts(arguments.prompts)
    model = ModelFolder.open(arguments.model, ("text_encoder",), variant=arguments.variant)
    model.check_weights(("text_encoder",))
    clean = caption_cleaner(arguments.clean_caption)
    int8 = "int8" if arguments.text_encoder_int8 else None
    cache = weights_cache(arguments.weights_cache)
    identity = model.text_identity(dtype, clean, int8) | {"stored_in": arguments.stored}
    devices = make_mesh(MeshConfig.parse(arguments.mesh), jax.local_devices())
    mesh = devices if devices.size > 1 else None

    def encoder() -> PromptEncoder:
        return PromptEncoder.from_pretrained(model, dtype, mesh, quantization=int8, cache=cache)

    texts = [row.prompt for row in rows] + [row.negative_prompt or "" for row in rows]
    texts += [arguments.negative_prompt, ""]
    notice_loss("prompt", texts, clean)
    count = encode_prompt_file(texts, out, identity, encoder, clean=clean)
    new = f"{count} of them new" if count else "all of them already there"
    size = out.stat().st_size / 2**20
    print(f"{len(set(map(clean, texts)))} texts, {new}, {size:.1f} MiB: {out}")
    return 0


def encode_prompt_file(
    texts: Sequence[str],
    out: Path,
    identity: Mapping[str, str],
    encoder: Callable[[], PromptEncoder],
    *,
    clean: Callable[[str], str] = clean_caption,
    part: int = PART,
    progress: bool = True,
) -> int:
    """Write the states of all texts to ``out``; return how many had to be encoded.

    identity: of the file, with cleaning and stored_in. encoder: opens the encoder, called only
    where a text is missing. Texts that are in the file already stay there. Raises UserError
    where the file has another identity, or another run is writing it.
    """
    wanted = list(dict.fromkeys(clean(text) for text in texts))
    parts = out.with_name(f".{out.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)

    def known() -> ChainMap[str, np.ndarray]:
        """The states of every text in the file and its parts."""
        files: list[Any] = [_states(path, identity) for path in (out, *parts.glob("*.safetensors"))]
        return ChainMap(*files)

    busy = UserError(f"another run encodes into {out}: wait for it")
    with locked(parts / "lock", busy=busy):
        there = known()
        missing = [text for text in wanted if text not in there]
        opened: Any = encoder() if missing else None
        done = len(wanted) - len(missing)
        with tqdm(total=len(wanted), initial=done, unit=" prompts", disable=not progress) as bar:
            for start in range(0, len(missing), part):
                some = missing[start : start + part]
                states = opened.states(some, identity["stored_in"], str, bar.update)
                number = len(list(parts.glob("*.safetensors")))
                write(parts / f"{number:05d}.safetensors", list(states), states, identity)
        if any(parts.glob("*.safetensors")):
            others = [text for text in _states(out, identity) if text not in set(wanted)]
            write(out, [*wanted, *others], known(), identity)
        shutil.rmtree(parts, ignore_errors=True)
    return len(missing)


def _states(path: Path, identity: Mapping[str, str]) -> Mapping[str, np.ndarray]:
    if not path.exists():
        return {}
    states = TextStates.open(path)
    states.check(identity)
    return states

"""``python -m pixart_jax inspect DATA``: a page that shows what a set holds, before anything is
trained on it.

DATA is a source, as encode takes it, or with --vae a folder of encoded shards. The page has
figures, pictures by bucket as training would crop them, captions and how many of them are cut,
duplicates by perceptual hash, and every record that is left out with its reason.
"""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from pixart_jax import cli
from pixart_jax.captioning.inspect import InspectOptions, survey, write
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import Sample, Source
from pixart_jax.data.sources.encoded import RecordsSource
from pixart_jax.encoding.options import SourceSpec
from pixart_jax.errors import UserError
from pixart_jax.images import to_uint8
from pixart_jax.text import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Arguments:
    source: tyro.conf.OmitArgPrefixes[tyro.conf.PositionalRequiredArgs[SourceSpec]]
    out: Path = Path("inspect")
    """Folder of the page; an earlier page there is replaced."""
    options: tyro.conf.OmitArgPrefixes[InspectOptions] = InspectOptions()
    vae: Path | None = None
    """Of encoded shards: the folder of the VAE that made them, or of a model that holds it; it
    shows what training sees."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "none"
    """A tokenizer's folder, or a model folder that holds one: counts tokens; none counts words
    alone."""
    strict: bool = False
    """Stop at the first record that cannot be read; otherwise it is named, counted and skipped."""


def main(argv: Sequence[str]) -> int:
    """Write the page; return exit status 0. Raises UserError for user errors."""
    arguments = cli.parse(Arguments, argv, prog="python -m pixart_jax inspect", description=__doc__)
    options, vae, tokenizer = arguments.options, arguments.vae, None
    if arguments.tokenizer != "none":
        folder = Path(arguments.tokenizer)
        inner = folder / "tokenizer"
        tokenizer = load_tokenizer(inner if inner.is_dir() else folder)
    faults = BadRecords(arguments.strict)
    source = arguments.source.open(faults)
    if isinstance(source, RecordsSource):
        if options.buckets:
            raise UserError("--buckets: encoded shards have buckets of their own")
        options = dataclasses.replace(options, buckets=source.buckets)
        source = _decoded(source, vae)
    elif vae is not None:
        raise UserError(f"--vae is for encoded shards, and {source.name} has its pictures")
    found = survey(source, options, tokenizer, faults=faults)
    found.figures["tokenizer"] = arguments.tokenizer if tokenizer else None
    path, figures = write(found, arguments.out), found.figures
    used = sum(count > 0 for count in figures["buckets"].values())
    print(
        f"{figures['looked_at']} samples of {source.name}: {figures['readable']} pictures in "
        f"{used} buckets, {len(figures['duplicate_groups'])} groups alike"
    )
    for kind, one in figures["captions"].items():
        cut = f", {one['cut']} longer than {options.max_text_tokens} tokens" if tokenizer else ""
        print(f"  captions {kind}: {one['texts']} of {one['samples']} samples{cut}")
    if len(faults):
        print(f"  {faults.summary()}")
    print(f"the page: {path}")
    return 0


def _decoded(source: RecordsSource, vae: Path | None) -> Source:
    """The records with the pictures that their VAE decodes. Raises UserError for another VAE."""
    if vae is None:
        raise UserError(
            f"{source.name} is encoded: give --vae, the folder of its VAE or of the model, or the "
            "set that it was made from"
        )
    from pixart_jax.pipeline.encoder_identity import component_identity
    from pixart_jax.weights.component import load_component
    from pixart_jax.weights.hub import model_folder

    vae = model_folder(vae, ("vae",))
    opened = load_component(vae / "vae" if (vae / "vae").is_dir() else vae)
    if component_identity(opened) != source.identity.get("vae"):
        raise UserError(f"--vae {vae}: {source.name} was encoded with another VAE")
    return DecodedSource(source, opened)


class DecodedSource:
    """Encoded records with pictures: what the VAE makes of their latents, which is all that
    training sees."""

    def __init__(self, encoded: RecordsSource, vae):
        self._encoded, self._vae, self._one_at_a_time = encoded, vae, threading.Lock()
        self.name, self.fingerprint = encoded.name, encoded.fingerprint
        self.caption_kinds, self.num_classes = encoded.caption_kinds, encoded.num_classes

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> Sample:
        sample = self._encoded[index]
        with self._one_at_a_time:  # so that each bucket compiles once
            pixels = np.asarray(self._vae.decode(self._encoded.latents(index)[None]))[0]
        png = io.BytesIO()
        Image.fromarray(to_uint8(pixels)).save(png, "PNG")
        return dataclasses.replace(sample, image=png.getvalue())

    def sizes(self) -> np.ndarray:
        """int32 [n, 2]: of the pictures before they were encoded."""
        return self._encoded.sizes()

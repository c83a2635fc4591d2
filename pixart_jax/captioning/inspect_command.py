"""``python -m pixart_jax inspect DATA``: a page that shows what a set holds, before anything is
trained on it.

DATA is a source, as encode takes it, or with --vae a folder of encoded shards. The page has
figures, pictures by bucket as training would crop them, captions and how many of them are cut,
duplicates by perceptual hash, and every record that is left out with its reason.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from pixart_jax import cli
from pixart_jax.data.faults import BadRecords
from pixart_jax.data.sources import open_source
from pixart_jax.data.sources.encoded import RecordsSource
from pixart_jax.errors import UserError
from pixart_jax.text import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Arguments:
    data: tyro.conf.Positional[str]
    """The set: a folder, 'tfds:NAME', 'webdataset:…': whatever encode takes as --source."""
    out: pathlib.Path = pathlib.Path("inspect")
    """Folder of the page; an earlier page there is replaced."""
    split: str = "train"
    """Of a set that has splits."""
    where: str | None = None
    """Only samples that pass this filter: a name ('single') or 'package.module:function'."""
    buckets: str | None = None
    """HEIGHTxWIDTH in px, with commas; or 256 (by itself), 512, 1024 or 2048 for that base's whole
    table. Encoded shards have their own."""
    vae: pathlib.Path | None = None
    """Of encoded shards: the folder of the VAE that made them, or of a model that holds it; it
    shows what training sees."""
    sample: int | None = None
    """Look at so many samples, drawn at random; all by default."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = "none"
    """A tokenizer's folder, or a model folder that holds one: counts tokens; none counts words
    alone."""
    max_text_tokens: int = 120
    """Texts of more tokens are cut in training."""
    shown: int = 12
    """Pictures a bucket on the page."""
    duplicates: int = 4
    """Bits of 64 in which the perceptual hashes of duplicates may differ; -1 looks for none."""
    threads: int = 4
    """That read pictures."""
    seed: int = 0
    """Of --sample, and of which pictures are shown."""
    strict: bool = False
    """Stop at the first record that cannot be read; otherwise it is named, counted and left out."""


def main(argv: Sequence[str]) -> int:
    """Write the page. Exit status 0; UserError for whatever the user can put right."""
    from pixart_jax.captioning.inspection import page
    from pixart_jax.captioning.inspection.survey import Options, survey
    from pixart_jax.encoding.encode_command import parse_buckets

    arguments = cli.parse(Arguments, argv, prog="python -m pixart_jax inspect", description=__doc__)
    for name, least in (
        ("sample", 1),
        ("max_text_tokens", 1),
        ("shown", 0),
        ("duplicates", -1),
        ("threads", 1),
        ("seed", 0),
    ):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if arguments.duplicates > 16:
        raise UserError(
            f"--duplicates {arguments.duplicates}: at most 16 bits; pictures that have nothing in "
            "common differ in about 32"
        )
    counting, name = None, None
    if arguments.tokenizer != "none":
        folder = pathlib.Path(arguments.tokenizer)
        folder = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
        counting, name = load_tokenizer(folder), arguments.tokenizer
    buckets = parse_buckets(arguments.buckets or "256")
    faults = BadRecords(strict=arguments.strict)
    source = open_source(arguments.data, arguments.split, where=arguments.where, faults=faults)
    if isinstance(source, RecordsSource):
        if arguments.buckets is not None:
            raise UserError("--buckets: encoded shards have buckets of their own")
        source, buckets = _decoded(source, arguments.vae), source.buckets
    elif arguments.vae is not None:
        raise UserError(f"--vae is for encoded shards, and {arguments.data} has its pictures")
    options = Options(
        buckets=buckets,
        max_text_tokens=arguments.max_text_tokens,
        shown=arguments.shown,
        distance=None if arguments.duplicates < 0 else arguments.duplicates,
        looked_at=arguments.sample,
        seed=arguments.seed,
        threads=arguments.threads,
    )
    found = survey(source, options, counting, faults=faults)
    path = page.write(found, options, arguments.out, name)
    used = sum(count > 0 for count in found.buckets.values())
    print(
        f"{found.looked_at} samples of {found.source}: {len(found.sizes)} pictures in {used} "
        f"buckets, {len(found.groups)} groups alike"
    )
    for kind, texts in found.texts.items():
        cut = (
            f", {texts.cut} longer than {arguments.max_text_tokens} tokens"
            if counting is not None
            else ""
        )
        print(f"  captions {kind}: {texts.texts} of {texts.samples} samples{cut}")
    if len(faults):
        print(f"  {faults.summary()}")
    print(f"the page: {path}")
    return 0


def _decoded(source: RecordsSource, vae: pathlib.Path | None):
    """Encoded shards with the pictures that their VAE makes of them."""
    if vae is None:
        raise UserError(
            f"{source.name} is encoded: give --vae, the folder of its VAE or of the model, or the "
            "set that it was made from"
        )
    from pixart_jax.captioning.inspection.decoded import Decoded
    from pixart_jax.pipeline.encoder_identity import component_identity
    from pixart_jax.weights.component import load_component

    opened = load_component(vae / "vae" if (vae / "vae").is_dir() else vae)
    if component_identity(opened) != source.identity.get("vae"):
        raise UserError(f"--vae {vae}: {source.name} was encoded with another VAE")
    return Decoded(source, opened)

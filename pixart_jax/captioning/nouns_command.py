"""``python -m pixart_jax nouns``: how many nouns captions hold, as the paper's table counts them,
with charts; sets side by side."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from pixart_jax import cli
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arguments:
    captions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """One or several: caption files (.jsonl with key and caption, .csv, .tsv, .parquet), folders of
    .txt, or sources as encode has them."""
    out: pathlib.Path
    """A folder for nouns.json, the charts (PNG) and the lists."""
    names: str = ""
    """What the sets are called, with commas between; by itself their files' names."""
    kind: str = ""
    """The kind of caption, or several with commas; by itself 'caption', or the one that there
    is."""
    threshold: int = 10
    """A noun is valid that occurs more often than this."""
    tagger: str = "textblob"
    """textblob (its model comes with it), nltk or spacy (where their models are installed;
    spacy:MODEL names one)."""
    singular: bool = False
    """Count a plural as its singular; the paper does not."""
    tokenizer: pathlib.Path | None = None
    """A tokenizer's folder (MODEL/tokenizer): count tokens too, as the text encoder sees them."""
    paper: bool = False
    """Show the paper's own table beside."""
    workers: int = 0
    """Processes that tag; 0 is one a core. The counts do not depend on it."""
    table: int = 4_000_000
    """Distinct nouns held in memory, at some 100 bytes each; beyond, they go into a temporary file.
    The counts do not depend on it."""
    split: str = "train"
    """Of a tfds set."""
    limit: int | None = None
    """Only the first so many records of each set."""
    strict: bool = False
    """Stop at the first bad record; otherwise it is named, counted and left out."""


def main(argv: Sequence[str]) -> int:
    """Count. Exit status 0; UserError for whatever the user can put right."""
    arguments = cli.parse(Arguments, argv, prog="python -m pixart_jax nouns", description=__doc__)
    if not arguments.captions:
        raise UserError(
            "no captions are given: a caption file, a folder of .txt or a source (python -m "
            "pixart_jax nouns --help)"
        )
    names = [name.strip() for name in arguments.names.split(",")] if arguments.names else []
    if names and len(names) != len(arguments.captions):
        raise UserError(
            f"--names has {len(names)} names, and {len(arguments.captions)} sets are given"
        )
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: is a file, and a folder is needed")
    from pixart_jax.captioning import noun_report
    from pixart_jax.captioning.nouns import NounOptions, count

    options = NounOptions(
        threshold=arguments.threshold,
        tagger=arguments.tagger,
        singular=arguments.singular,
        tokenizer=arguments.tokenizer,
        kinds=tuple(kind.strip() for kind in arguments.kind.split(",") if kind.strip()),
        workers=arguments.workers,
        table=arguments.table,
    )
    if options.tokenizer is not None:
        from pixart_jax.text import load_tokenizer

        load_tokenizer(options.tokenizer)  # that it is one: said before hours of tagging
    sets = []
    for number, what in enumerate(arguments.captions):
        sets.append(
            count(what, options, BadRecords(arguments.strict), arguments.split, arguments.limit)
        )
        sets[-1].name = (
            names[number] if names else _free(sets[-1].name, [one.name for one in sets[:-1]])
        )
    print(noun_report.table(sets, arguments.paper))
    print(
        f"nouns by {options.tagger}; valid: more than {options.threshold} times; dropped: ", end=""
    )
    print(
        "; ".join(
            f"{one.distinct - one.valid:,} nouns, {one.dropped_total:,} occurrences" for one in sets
        )
    )
    for one in sets:
        if one.faults.summary():
            print(f"{one.name}: {one.faults.summary()}")
            for fault in list(one.faults)[:5]:
                print(f"  {fault}")
    files = noun_report.write(sets, options, arguments.out, arguments.paper)
    print(f"{', '.join(file.name for file in files)}: {arguments.out}")
    return 0


def _free(name: str, taken: Sequence[str]) -> str:
    """The name, with a number where a set before has it."""
    candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)

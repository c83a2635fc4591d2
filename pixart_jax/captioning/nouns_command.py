"""``python -m pixart_jax nouns``: how many nouns captions hold, as the paper's table counts them,
with charts; sets side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pixart_jax import cli
from pixart_jax.captioning import noun_report
from pixart_jax.captioning.nouns import NounCounts, NounOptions, count
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError
from pixart_jax.text import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Arguments:
    captions: Annotated[tuple[str, ...], tyro.conf.Positional]
    """One or several: caption files (.jsonl with key and caption, .csv, .tsv, .parquet), folders of
    .txt, or sources as encode has them."""
    out: Path
    """A folder for nouns.json, the charts (PNG) and the lists."""
    options: tyro.conf.OmitArgPrefixes[NounOptions] = NounOptions()
    names: str = ""
    """Names of the sets, separated by commas; by default those of their files."""
    paper: bool = False
    """Show the paper's own table beside."""
    split: str = "train"
    """Of a tfds set."""
    limit: int | None = None
    """Only the first so many records of each set."""
    strict: bool = False
    """Stop at the first bad record; otherwise it is named, counted and skipped."""


def main(argv: Sequence[str]) -> int:
    """Count; return exit status 0. Raises UserError for user errors."""
    arguments = cli.parse(Arguments, argv, prog="python -m pixart_jax nouns", description=__doc__)
    options, given = arguments.options, arguments.captions
    if not given:
        raise UserError(
            "no captions are given: a caption file, a folder of .txt or a source (python -m "
            "pixart_jax nouns --help)"
        )
    names = [name.strip() for name in arguments.names.split(",")] if arguments.names else []
    if names and len(names) != len(given):
        raise UserError(f"--names has {len(names)} names, and {len(given)} sets are given")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise UserError(f"--out {arguments.out}: is a file, and a folder is needed")
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)  # raises before hours of tagging
    sets: list[NounCounts] = []
    for number, what in enumerate(given):
        faults = BadRecords(arguments.strict)
        one = count(what, options, faults, arguments.split, arguments.limit)
        one.name = names[number] if names else _free(one.name, {other.name for other in sets})
        sets.append(one)
    print(noun_report.table(sets, arguments.paper))
    dropped = (f"{s.distinct - s.valid:,} nouns, {s.dropped_total:,} occurrences" for s in sets)
    threshold = f"valid: more than {options.threshold} times"
    print(f"nouns by {options.tagger}; {threshold}; dropped: {'; '.join(dropped)}")
    for one in sets:
        if one.faults.summary():
            print(f"{one.name}: {one.faults.summary()}")
            for fault in list(one.faults)[:5]:
                print(f"  {fault}")
    files = noun_report.write(sets, options, arguments.out, arguments.paper)
    print(f"{', '.join(file.name for file in files)}: {arguments.out}")
    return 0


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number where an earlier set has it."""
    candidates = (name if n == 1 else f"{name}-{n}" for n in range(1, len(taken) + 2))
    return next(candidate for candidate in candidates if candidate not in taken)

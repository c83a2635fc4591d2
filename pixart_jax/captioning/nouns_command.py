"""``python -m pixart_jax nouns``: the nouns of captions, as the paper's table counts them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from pixart_jax import cli, plots
from pixart_jax.captioning.nouns import (
    RULE,
    NounCounts,
    NounOptions,
    count,
    quantiles,
    tagger_description,
)
from pixart_jax.data.faults import BadRecords
from pixart_jax.errors import UserError
from pixart_jax.files import atomic_write, write_json
from pixart_jax.text import load_tokenizer

# The paper's table: VN, DN, VN/DN in %, total nouns, average per image, as printed. It counts with
# NLTK; valid is more than 10 times.
PAPER = {
    "LAION": (210_000, 2_461_000, 8.5, 72_000_000, 6.4),
    "LAION-LLaVA": (85_000, 646_000, 13.3, 233_900_000, 20.9),
    "SAM-LLaVA": (23_000, 124_000, 18.6, 327_900_000, 29.3),
    "Internal": (152_000, 582_000, 26.1, 136_600_000, 12.2),
}
COLUMNS = ("VN", "DN", "VN/DN, %", "total_nouns", "average")
TEXT_TOKENS = 120  # what PixArt-α's text encoder takes


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
    options, given, out = arguments.options, arguments.captions, arguments.out
    if not given:
        raise UserError("no captions are given: a caption file, a folder of .txt or a source")
    names = [name.strip() for name in arguments.names.split(",")] if arguments.names else []
    if names and len(names) != len(given):
        raise UserError(f"--names has {len(names)} names, and {len(given)} sets are given")
    out.mkdir(parents=True, exist_ok=True)
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)  # raises before hours of tagging
    sets: list[NounCounts] = []
    for number, what in enumerate(given):
        faults = BadRecords(arguments.strict)
        one = count(what, options, faults, arguments.split, arguments.limit)
        one.name = names[number] if names else one.name
        while one.name in {other.name for other in sets}:
            one.name += "-2"
        sets.append(one)
    print(table(sets, arguments.paper))
    dropped = (f"{s.distinct - s.valid:,} nouns, {s.dropped_total:,} occurrences" for s in sets)
    threshold = f"valid: more than {options.threshold} times"
    print(f"nouns by {options.tagger}; {threshold}; dropped: {'; '.join(dropped)}")
    for one in sets:
        print(f"{one.name}: {one.faults.report(one.images)}")
        for fault in list(one.faults)[:5]:
            print(f"  {fault}")
    files = write(sets, options, out, arguments.paper)
    print(f"{', '.join(file.name for file in files)}: {out}")
    return 0


def _row(one: NounCounts) -> tuple[int, int, float, int, float]:
    return one.valid, one.distinct, round(100 * one.ratio, 1), one.total, round(one.average, 1)


def table(sets: Sequence[NounCounts], paper: bool = False) -> str:
    """The paper's table as text, one line per set."""
    rows = ["data set|images|captions|VN|DN|VN/DN|total nouns|average|words".split("|")]
    for one in sets:
        valid, distinct, ratio, total, average = _row(one)
        figures = f"{one.images:,} {one.captions:,} {valid:,} {distinct:,} {ratio}% {total:,}"
        rows.append([one.name, *figures.split(), f"{average}", f"{_mean(one.words):.1f}"])
    for name, (valid, distinct, ratio, total, average) in PAPER.items() if paper else ():
        figures = f"{valid // 1000}K {distinct // 1000}K {ratio}% {total / 1e6:.1f}M {average}"
        rows.append([f"{name} (paper)", "", "", *figures.split(), ""])
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def write(
    sets: Sequence[NounCounts], options: NounOptions, folder: Path, paper: bool = False
) -> list[Path]:
    """Write nouns.json, charts and lists to ``folder``; return the files."""
    files = [folder / "nouns.json"]
    write_json(files[0], _figures(sets, options), indent=1, ensure_ascii=False)
    for one in sets:
        stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in one.name)
        prefix = f"{stem}." if len(sets) > 1 else ""
        if one.nouns:
            title = f"{_shown(one.name)}: the most frequent nouns"
            chart, top = folder / f"{prefix}top_nouns.png", dict(one.top()[:40])
            files.append(plots.bars(chart, top, title=title, axis="occurrences", across=True))
        files.append(folder / f"{prefix}dropped_nouns.txt")
        with atomic_write(files[-1], "w", encoding="utf-8", errors="backslashreplace") as out:
            out.writelines(f"{noun}\t{times}\n" for noun, times in one.dropped())
        if one.faults.write(file := folder / f"{prefix}faults.jsonl"):
            files.append(file)
    words = {one.name: one.words for one in sets}
    files.append(_lengths(folder / "caption_words.png", words, "words"))
    if options.tokenizer:
        tokens = {one.name: one.tokens for one in sets}
        files.append(_lengths(folder / "caption_tokens.png", tokens, "tokens", TEXT_TOKENS))
    if len(sets) > 1 or paper:
        rows = {_shown(one.name): _row(one) for one in sets}
        rows |= {f"{name} (paper)": row for name, row in PAPER.items()} if paper else {}
        valid = f"valid nouns (more than {options.threshold} times)"
        titles = {valid: 0, "distinct nouns": 1, "valid of distinct, %": 2, "nouns an image": 4}
        panels = {title: {n: row[i] for n, row in rows.items()} for title, i in titles.items()}
        files.append(plots.panels(folder / "side_by_side.png", panels, title="nouns"))
    return files


def _figures(sets: Sequence[NounCounts], options: NounOptions) -> dict:
    plurals = "plurals as singular" if options.singular else "plurals as they are"
    figures: dict = {
        "tagger": tagger_description(options.tagger),
        "noun": f"{RULE}; {plurals}",
        "threshold": options.threshold,
        "valid": f"occurs more than {options.threshold} times",
        "sets": [],
        "paper": {name: dict(zip(COLUMNS, row)) for name, row in PAPER.items()},
    }
    for one in sets:
        tokens = None
        if options.tokenizer:
            above = sum(n for length, n in one.tokens.items() if length > TEXT_TOKENS)
            tokens = _summary(one.tokens) | {f"above_{TEXT_TOKENS}": above}
        figures["sets"].append(
            {
                "name": one.name,
                "images": one.images,
                "captions": one.captions,
                "VN": one.valid,
                "DN": one.distinct,
                "VN/DN": round(one.ratio, 6),
                "total_nouns": one.total,
                "average": round(one.average, 4),
                "dropped_nouns": one.distinct - one.valid,
                "dropped_occurrences": one.dropped_total,
                "words_too_long": one.too_long,
                "words": _summary(one.words),
                "tokens": tokens,
                "left_out": dict(one.faults.counts),
                "mended": dict(one.faults.repaired),
                "top": one.top(),
            }
        )
    return figures


def _mean(lengths: Counter[int]) -> float:
    return sum(length * times for length, times in lengths.items()) / lengths.total()


def _summary(lengths: Counter[int]) -> dict:
    median, p95 = quantiles(lengths, 0.5, 0.95)
    mean = round(_mean(lengths), 2)
    return {"mean": mean, "median": median, "p95": p95, "longest": max(lengths)}


def _lengths(
    path: Path, sets: Mapping[str, Counter[int]], unit: str, mark: int | None = None
) -> Path:
    """A histogram of some fifty bins, up to the 99.5 % quantile; the last holds the rest."""
    longest = max(10, *(quantiles(one, 0.995)[0] for one in sets.values()), (mark or 0) + 8)
    step = max(1, math.ceil(longest / 50))
    edges = list(range(0, (longest // step + 1) * step + 1, step))
    counts = {_shown(name): [0] * (len(edges) - 1) for name in sets}
    for bins, lengths in zip(counts.values(), sets.values()):
        for length, times in lengths.items():
            bins[min(length // step, len(bins) - 1)] += times
    title = f"captions by {unit}" + ("" if len(sets) > 1 else f": {_shown(next(iter(sets)))}")
    axis = f"{unit} (the last bin: and more)"
    return plots.histograms(path, edges, counts, title=title, axis=axis, mark=mark)


def _shown(name: str) -> str:
    """A name that a chart can show: its font lacks control characters, and $ begins a formula."""
    return "".join(c if c.isprintable() and c != "$" else " " for c in name)[:40]

"""What was counted, as a table, JSON, charts and lists; and the paper's own table beside it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from pixart_jax import plots
from pixart_jax.captioning import taggers
from pixart_jax.captioning.nouns import Lengths, NounCounts, NounOptions

# The paper's table: VN, DN, VN/DN in %, total nouns, average an image, as printed. It counts with
# NLTK, valid is more than 10 times.
PAPER = {
    "LAION": (210_000, 2_461_000, 8.5, 72_000_000, 6.4),
    "LAION-LLaVA": (85_000, 646_000, 13.3, 233_900_000, 20.9),
    "SAM-LLaVA": (23_000, 124_000, 18.6, 327_900_000, 29.3),
    "Internal": (152_000, 582_000, 26.1, 136_600_000, 12.2),
}
TOP_SHOWN = 40
TEXT_TOKENS = 120  # what PixArt-α's text encoder takes


def table(sets: Sequence[NounCounts], paper: bool = False) -> str:
    """The paper's table as text, a line a set."""
    head = (
        "data set",
        "images",
        "captions",
        "VN",
        "DN",
        "VN/DN",
        "total nouns",
        "average",
        "words",
    )
    rows = [
        (
            one.name,
            f"{one.images:,}",
            f"{one.captions:,}",
            f"{one.valid:,}",
            f"{one.distinct:,}",
            f"{one.ratio:.1%}",
            f"{one.total:,}",
            f"{one.average:.1f}",
            f"{one.words.mean():.1f}",
        )
        for one in sets
    ]
    if paper:
        rows += [
            (
                f"{name} (paper)",
                "",
                "",
                f"{vn // 1000}K",
                f"{dn // 1000}K",
                f"{ratio}%",
                f"{total / 1e6:.1f}M",
                f"{average}",
                "",
            )
            for name, (vn, dn, ratio, total, average) in PAPER.items()
        ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [
        "  ".join(
            cell.ljust(w) if n == 0 else cell.rjust(w)
            for n, (cell, w) in enumerate(zip(row, widths))
        )
        for row in (head, *rows)
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def write(
    sets: Sequence[NounCounts], options: NounOptions, folder: Path, paper: bool = False
) -> list[Path]:
    """nouns.json, charts and lists in ``folder``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [_json(sets, options, folder / "nouns.json")]
    for one, stem in zip(sets, _stems(sets), strict=True):
        mark = f"{stem}." if len(sets) > 1 else ""
        if one.top:
            files.append(
                plots.bars(
                    folder / f"{mark}top_nouns.png",
                    dict(one.top[:TOP_SHOWN]),
                    title=f"{_shown(one.name)}: the most frequent nouns",
                    axis="occurrences",
                    across=True,
                )
            )
        text = [f"{noun}\t{times}\n" for noun, times in one.dropped]
        files.append(_text(folder / f"{mark}dropped_nouns.txt", "".join(text)))
        if len(one.faults) or getattr(one.faults, "mended", None):
            lines = [
                json.dumps(
                    {"place": f.place, "kind": f.kind, "detail": f.detail}, ensure_ascii=False
                )
                + "\n"
                for f in one.faults
            ]
            files.append(_text(folder / f"{mark}faults.jsonl", "".join(lines)))
    files.append(
        _lengths(folder / "caption_words.png", {one.name: one.words for one in sets}, "words")
    )
    if all(one.tokens is not None for one in sets):
        files.append(
            _lengths(
                folder / "caption_tokens.png",
                {one.name: one.tokens for one in sets},
                "tokens",
                TEXT_TOKENS,
            )
        )
    if len(sets) > 1 or paper:
        files.append(_side_by_side(folder / "side_by_side.png", sets, options, paper))
    return files


def _json(sets: Sequence[NounCounts], options: NounOptions, path: Path) -> Path:
    tagger = taggers.open_tagger(options.tagger, options.singular)
    said = {
        "tagger": {
            "name": tagger.name,
            "version": tagger.version,
            "model": tagger.model,
            "tags": list(taggers.TAGS),
        },
        "noun": taggers.RULE
        + ("; plurals as singular" if options.singular else "; plurals as they are"),
        "threshold": options.threshold,
        "valid": f"occurs more than {options.threshold} times",
        "sets": [_facts(one) for one in sets],
        "paper": {
            name: dict(zip(("VN", "DN", "VN/DN, %", "total_nouns", "average"), row))
            for name, row in PAPER.items()
        },
    }
    return _text(path, json.dumps(said, indent=1, ensure_ascii=False) + "\n")


def _facts(one: NounCounts) -> dict:
    return {
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
        "words": one.words.summary(),
        "tokens": None
        if one.tokens is None
        else {**one.tokens.summary(), f"above_{TEXT_TOKENS}": one.tokens.above(TEXT_TOKENS)},
        "left_out": dict(one.faults.counts),
        "mended": dict(getattr(one.faults, "mended", {})),
        "table_spills": one.spills,
        "top": one.top,
    }


def _lengths(path: Path, sets: dict[str, Lengths], unit: str, mark: float | None = None) -> Path:
    """Some fifty bins up to what 99.5 % of the captions do not exceed; the last bin holds the rest
    too."""
    most = max(10, *(lengths.quantile(0.995) for lengths in sets.values()), int(mark or 0) + 8)
    step = max(1, math.ceil(most / 50))
    edges = list(range(0, (most // step + 1) * step + 1, step))
    counts = {}
    for name, lengths in sets.items():
        bins = [0] * (len(edges) - 1)
        for length, times in lengths.counts.items():
            bins[min(length // step, len(bins) - 1)] += times
        counts[_shown(name)] = bins
    title = f"captions by {unit}" + ("" if len(sets) > 1 else f": {_shown(next(iter(sets)))}")
    return plots.histograms(
        path, edges, counts, title=title, axis=f"{unit} (the last bin: and more)", mark=mark
    )


def _side_by_side(
    path: Path, sets: Sequence[NounCounts], options: NounOptions, paper: bool
) -> Path:
    rows = {
        _shown(one.name): (
            one.valid,
            one.distinct,
            round(100 * one.ratio, 1),
            one.total,
            round(one.average, 1),
        )
        for one in sets
    }
    if paper:
        rows |= {f"{name} (paper)": row for name, row in PAPER.items()}
    panels = {
        f"valid nouns (more than {options.threshold} times)": {
            name: row[0] for name, row in rows.items()
        },
        "distinct nouns": {name: row[1] for name, row in rows.items()},
        "valid of distinct, %": {name: row[2] for name, row in rows.items()},
        "nouns an image": {name: row[4] for name, row in rows.items()},
    }
    return plots.panels(path, panels, title="nouns")


def _stems(sets: Sequence[NounCounts]) -> list[str]:
    return ["".join(c if c.isalnum() or c in "-_." else "-" for c in one.name) for one in sets]


def _shown(name: str) -> str:
    """A name as a chart can draw it: its font knows neither every script nor formulas."""
    return "".join(c if c.isprintable() and c != "$" else " " for c in name)[:40]


def _text(path: Path, text: str) -> Path:
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(fresh, path)
    return path

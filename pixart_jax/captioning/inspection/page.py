"""A survey as a folder: index.html with its pictures and charts, and inspect.json with every
figure."""

from __future__ import annotations

import html
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from pixart_jax import plots
from pixart_jax.captioning.inspection.survey import Options, Shown, Survey, Texts
from pixart_jax.errors import UserError

FIGURES = "inspect.json"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin-bottom: .4rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; }
.sheet { display: flex; flex-wrap: wrap; gap: .8rem; } figure { margin: 0; width: 13rem; }
figure img { max-width: 100%; border: 1px solid #ddd; } figcaption { font-size: .78rem; overflow-wrap: anywhere; }
figcaption .key { color: #666; } figcaption p { margin: .2rem 0; max-height: 7.5em; overflow: auto; } .kind { color: #06579b; }
.warn { color: #a02020; } img.chart { max-width: 46rem; width: 100%; }
"""  # noqa: E501
_MOST_FAULTS = 500  # on the page; the file has all that were kept


def write(found: Survey, options: Options, out: Path, tokenizer_name: str | None) -> Path:
    """Write the folder, whole or not at all; returns the page. UserError where ``out`` holds
    anything but an earlier page."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir()) and not (out / FIGURES).exists()):
        raise UserError(
            f"--out {out}: it holds something else than an earlier page; give another folder"
        )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "pictures").mkdir(parents=True)
    (partial / FIGURES).write_text(
        json.dumps(figures(found, options, tokenizer_name), indent=1) + "\n", encoding="utf-8"
    )
    (partial / "index.html").write_text(
        _page(found, options, partial, tokenizer_name), encoding="utf-8"
    )
    if out.exists():
        shutil.rmtree(out)
    partial.replace(out)
    return out / "index.html"


def figures(found: Survey, options: Options, tokenizer_name: str | None) -> dict:
    """Every number of the page."""
    return {
        "source": found.source,
        "samples": found.of,
        "looked_at": found.looked_at,
        "readable": int(len(found.sizes)),
        "buckets": {_name(bucket): count for bucket, count in found.buckets.items()},
        "enlarged": found.enlarged,
        "classes": len([label for label in found.labels if label >= 0]),
        "captions": {
            kind: _text_figures(texts, options, tokenizer_name)
            for kind, texts in found.texts.items()
        },
        "tokenizer": tokenizer_name,
        "max_text_tokens": options.max_text_tokens,
        "duplicate_distance": options.distance,
        "duplicate_groups": found.groups,
        "left_out": dict(found.faults.counts),
        "faults": [
            {"place": fault.place, "kind": fault.kind, "detail": fault.detail}
            for fault in found.faults
        ],
    }


def _text_figures(texts: Texts, options: Options, tokenizer_name: str | None) -> dict:
    counted = {
        "samples": texts.samples,
        "texts": texts.texts,
        "empty": texts.empty,
        "repeated": texts.repeated,
    }
    counted |= {"words": _spread(texts.words)}
    return counted | ({"tokens": _spread(texts.tokens), "cut": texts.cut} if tokenizer_name else {})


def _spread(lengths: Counter) -> dict[str, float]:
    """Least, median, mean, the 95th of 100, and most."""
    if not lengths:
        return {}
    values = np.array(sorted(lengths))
    counts = np.array([lengths[v] for v in values])
    below = np.cumsum(counts) / counts.sum()
    at = {
        name: int(values[np.searchsorted(below, share - 1e-12)])
        for name, share in (("median", 0.5), ("p95", 0.95))
    }
    return {
        "least": int(values[0]),
        **at,
        "mean": round(float((values * counts).sum() / counts.sum()), 2),
        "most": int(values[-1]),
    }


def _name(bucket: tuple[int, int]) -> str:
    return f"{bucket[0]}×{bucket[1]}"


def _page(found: Survey, options: Options, folder: Path, tokenizer_name: str | None) -> str:
    parts = [f"<h1>{html.escape(found.source)}</h1>", _table(_overview(found, options))]
    used = {_name(bucket): count for bucket, count in found.buckets.items() if count}
    if used:
        plots.bars(
            folder / "buckets.png",
            used,
            title="pictures by bucket (height × width)",
            axis="pictures",
        )
        parts += [
            "<h2>Buckets</h2>",
            '<img class="chart" src="buckets.png" alt="pictures by bucket">',
        ]
    parts += _captions(found, options, folder, tokenizer_name)
    if len(found.faults):
        parts += ["<h2>Left out</h2>", f'<p class="warn">{html.escape(found.faults.summary())}</p>']
        kept = list(found.faults)
        parts.append(
            _table(
                [
                    (f.place, f"{f.kind}{f': {f.detail}' if f.detail else ''}")
                    for f in kept[:_MOST_FAULTS]
                ]
            )
        )
        if len(kept) > _MOST_FAULTS:
            parts.append(f"<p>… and {len(kept) - _MOST_FAULTS} more: {FIGURES}</p>")
    if options.distance is not None:
        parts.append("<h2>Duplicates</h2>")
        what = f"pictures whose perceptual hashes differ in at most {options.distance} of 64 bits"
        parts.append(
            f"<p>{len(found.groups)} groups of {what}.</p>"
            if found.groups
            else f"<p>No {what}.</p>"
        )
        for number, (keys, pictures) in enumerate(zip(found.groups, found.group_pictures)):
            more = (
                f" ({len(keys)} pictures, {len(pictures)} shown)"
                if len(keys) > len(pictures)
                else ""
            )
            parts += [
                f"<h3>Group {number + 1}{more}</h3>",
                _sheet(pictures, folder, f"same-{number:03d}"),
            ]
    for bucket, pictures in found.shown.items():
        parts.append(f"<h2>{_name(bucket)} px: {len(pictures)} of {found.buckets[bucket]}</h2>")
        parts.append(_sheet(pictures, folder, f"{bucket[0]}x{bucket[1]}"))
    head = (
        f'<meta charset="utf-8"><title>{html.escape(found.source)}</title><style>{_STYLE}</style>'
    )
    return (
        "<!doctype html>\n<html "
        f'lang="en"><head>{head}</head>\n<body>\n{"".join(part + chr(10) for part in parts)}</body></html>\n'  # noqa: E501
    )


def _overview(found: Survey, options: Options) -> list[tuple[str, str]]:
    rows = [("samples", f"{found.of:,}")]
    if found.looked_at < found.of:
        rows.append(("looked at", f"{found.looked_at:,}, drawn at random (seed {options.seed})"))
    rows.append(("readable pictures", f"{len(found.sizes):,}"))
    if len(found.sizes):
        short, long = found.sizes.min(1), found.sizes.max(1)
        rows.append(
            (
                "shorter side, px",
                f"{short.min()} … {int(np.median(short))} (median) … {short.max()}",
            )
        )
        rows.append(
            ("longer side, px", f"{long.min()} … {int(np.median(long))} (median) … {long.max()}")
        )
        rows.append(
            (
                "smaller than their bucket",
                f"{found.enlarged:,} ({found.enlarged / len(found.sizes):.1%}), enlarged for "
                "training",
            )
        )
        rows.append(
            (
                "buckets in use",
                f"{sum(n > 0 for n in found.buckets.values())} of {len(found.buckets)}",
            )
        )
    if any(label >= 0 for label in found.labels):
        rows.append(("classes", str(len([label for label in found.labels if label >= 0]))))
    rows.append(("left out", found.faults.summary() or "nothing"))
    return rows


def _captions(
    found: Survey, options: Options, folder: Path, tokenizer_name: str | None
) -> list[str]:
    if not found.texts:
        return ["<h2>Captions</h2>", "<p>None.</p>"]
    parts = ["<h2>Captions</h2>"]
    for number, (kind, texts) in enumerate(found.texts.items()):
        words = _spread(texts.words)
        rows = [
            (
                "texts",
                f"{texts.texts:,} of {texts.samples:,} samples; "
                f"{found.looked_at - texts.samples:,} samples have none",
            ),
            ("words", _said(words)),
            ("empty", f"{texts.empty:,}"),
            ("said again word for word", f"{texts.repeated:,}"),
        ]
        lengths, axis, mark = texts.words, "words", None
        if tokenizer_name:
            share = texts.cut / max(texts.texts, 1)
            rows.insert(2, ("tokens", _said(_spread(texts.tokens))))
            rows.insert(
                3, (f"cut at {options.max_text_tokens} tokens", f"{texts.cut:,} ({share:.1%})")
            )
            lengths, axis, mark = (
                texts.tokens,
                f"tokens ({tokenizer_name})",
                options.max_text_tokens,
            )
        parts += [f"<h3>{html.escape(kind)}</h3>", _table(rows)]
        if lengths:
            end = max(max(lengths), mark or 0) + 1
            edges = np.arange(0, end + 1, -(-end // 80))  # whole numbers, at most 80 bins
            edges = np.append(edges, end) if edges[-1] < end else edges
            counts, _ = np.histogram(list(lengths), edges, weights=list(lengths.values()))
            name = f"captions-{number}.png"
            plots.histograms(
                folder / name,
                edges,
                {kind: counts},
                title=f"length of captions: {kind}",
                axis=axis,
                mark=mark,
            )
            parts.append(f'<img class="chart" src="{name}" alt="length of captions">')
    return parts


def _said(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in spread.items())


def _table(rows: list[tuple[str, str]]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
        + "</table>"
    )


def _sheet(pictures: list[Shown], folder: Path, name: str) -> str:
    figures = []
    for number, picture in enumerate(pictures):
        file = f"pictures/{name}-{number:02d}.jpg"
        (folder / file).write_bytes(picture.jpeg)
        said = "".join(
            f'<p><span class="kind">{html.escape(kind)}</span> {html.escape(text[:2000])}</p>'
            for kind, texts in picture.captions.items()
            for text in texts[:3]
        )
        size = f"{picture.size[0]}×{picture.size[1]}"
        key = f'<span class="key">{html.escape(picture.key)} · {size}</span>'
        figures.append(
            f'<figure><img loading="lazy" src="{file}" '
            f'alt=""><figcaption>{key}{said}</figcaption></figure>'
        )
    return f'<div class="sheet">{"".join(figures)}</div>'

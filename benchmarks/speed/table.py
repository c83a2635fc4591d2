"""Markdown of what was measured.

python -m benchmarks.speed.table FILE [FILE …]     (the tables of files that --json wrote)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.record import runs_of

COLUMNS = (
    "model",
    "px",
    "batch",
    "dtype",
    "side",
    "median s",
    "best s",
    "ours / it",
    "TFLOP/s",
    "of the limit",
    "MFU",
    "images/s",
    "compile s",
    "peak GiB",
    "error",
)
NAMES = {"ours": "jax", "peer": "torch"}
KINDS = {"forward": "Forward", "sample": "Sampling", "draw": "Prompt to PNG", "train": "Train step"}


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns in which no row has anything are left out."""
    kept = (
        [n for n, _ in enumerate(columns) if any(row[n] for row in rows)]
        if rows
        else range(len(columns))
    )
    lines = [
        [columns[n] for n in kept],
        ["---"] * len(kept),
        *([row[n] for n in kept] for row in rows),
    ]
    return (
        "\n".join(
            f"|{'|'.join(f' {cell} ' if cell != '---' else cell for cell in line)}|"
            for line in lines
        )
        + "\n"
    )


def cells(row: dict) -> list[str]:
    """A row's cells under COLUMNS; what was not measured is empty."""
    case = row["case"]
    first = [case["model"], row["size"], str(case["batch"]), case["dtype"], row["side"]]
    if "failed" in row:
        return [*first, "failed", *[""] * (len(COLUMNS) - len(first) - 1)]
    share = "" if row["mfu"] is None else f"{row['mfu']:.3f}"
    ratio = "" if row["ratio"] is None else f"**{row['ratio']:.3f}**"
    error = f"{max(row['errors'].values()):.1e}" if row["errors"] else ""
    return [
        *first,
        f"{row['median']:.4g}",
        f"{row['best']:.4g}",
        ratio,
        f"{row['flop_per_second'] / 1e12:.3g}",
        f"{row['share_of_limit']:.2f}",
        share,
        f"{row['images_per_second']:.3g}",
        f"{row['compile_seconds']:.1f}",
        f"{row['peak_bytes'] / 2**30:.2f}",
        error,
    ]


def tables(runs: Sequence[dict]) -> str:
    """A table a kind of work over all runs, and a line a machine and limit."""
    rows = [row for run in runs for row in run.get("rows", ())]
    parts = []
    for kind, title in KINDS.items():
        found = [row for row in rows if row["case"]["kind"] == kind]
        if found:
            parts.append(f"**{title}**\n\n{table(COLUMNS, [cells(row) for row in found])}")
    parts += [render(run["columns"], run["cells"], run["title"]) for run in runs if "cells" in run]
    failures = [
        f"- {row['size']} px, batch {row['case']['batch']}, {row['side']}: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    failures += [
        f"- {run['part']}: {run['status']} after {run['seconds']:.0f} s"
        for run in runs
        if run.get("status", "done") != "done"
    ]
    if failures:
        parts.append("Failed:\n\n" + "\n".join(failures) + "\n")
    return "\n".join([*parts, limits_line(runs)])


def render(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    return f"**{title}**\n\n{table(columns, rows)}"


def limits_line(runs: Sequence[dict]) -> str:
    """What the machine can do at most, the best that the runs measured; and the versions."""
    measured = [run for run in runs if run.get("limits")]
    if not measured:
        return ""
    found = []
    for dtype in dict.fromkeys(dtype for run in measured for dtype in run["limits"]):
        sides = [side for run in measured for side in run["limits"].get(dtype, {}).items()]
        best = {
            name: max(limit["product"] for other, limit in sides if other == name)
            for name in sorted({name for name, _ in sides})
        }
        products = ", ".join(
            f"{NAMES[name]} {product / 1e12:.3g}" for name, product in best.items()
        )
        copy = max(limit["copy"] for _, limit in sides)
        found.append(
            f"{dtype} product of {sides[0][1]['side']}³: {products} TFLOP/s; copy, read and "
            f"written, {copy / 1e9:.3g} GB/s"
        )
    machine = measured[-1]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"Limits of {machine.get('device', 'this machine')}, {machine['cores']} cores: "
        f"{'; '.join(found)}. {versions}.\n"
    )


if __name__ == "__main__":
    print(tables([run for path in sys.argv[1:] for run in runs_of(Path(path))]))

"""The JSON file of a benchmark, and Markdown tables of it.

    python -m benchmarks.speed.table FILE [FILE …]                       print the tables
    python -m benchmarks.speed.table FILE --part NAME STATUS SECONDS     note a part of gpu.sh

A file holds a list of runs, each with its machine, limits and rows, and is rewritten as rows come.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed import machine
from pixart_jax.files import write_json, write_text

COLUMNS = (
    "model,px,batch,dtype,side,median s,best s,ours / it,TFLOP/s,of the limit,MFU,images/s,"
    "compile s,peak GiB,error"
).split(",")
NAMES = {"ours": "jax", "peer": "torch"}
KINDS = {
    "forward": "Forward",
    "control": "Forward under a ControlNet",
    "sample": "Sampling",
    "draw": "Prompt to PNG",
    "train": "Train step",
}


def flag_parser(document: str | None) -> argparse.ArgumentParser:
    """A program's flags; its docstring is the help, as it is."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=document, formatter_class=raw)


def tell(line: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what a page has between two markers."""
    head, rest = page.read_text(encoding="utf-8").split(begin)
    write_text(page, f"{head}{begin}\n{text}{end}{rest.split(end)[1]}")


def runs_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["runs"] if path.is_file() else []


class Record:
    """One run of a file, after the runs that the file already holds. path None: no file."""

    def __init__(self, path: Path | None, argv: Sequence[str], **facts):
        self._path = path
        self._before = runs_of(path) if path else []
        command = " ".join(["python", Path(sys.argv[0]).name, *argv])
        self.run = {"command": command, "machine": machine.described(), "limits": {}, "rows": []}
        self.run |= facts

    def write(self) -> None:
        if self._path:
            _write(self._path, [*self._before, self.run])


def _write(path: Path, runs: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"runs": runs}, indent=1)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns in which no row has anything are left out."""
    shown = [n for n, _ in enumerate(columns) if not rows or any(row[n] for row in rows)]
    lines = [f"| {' | '.join(line[n] for n in shown)} |" for line in [columns, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(shown), *lines[1:]]) + "\n"


def render(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    return f"**{title}**\n\n{table(columns, rows)}"


def cells(row: dict) -> list[str]:
    """A row's cells under COLUMNS; what was not measured is empty."""
    case = row["case"]
    first = [case["model"], row["size"], str(case["batch"]), case["dtype"], row["side"]]
    if "failed" in row:
        return [*first, "failed", *[""] * (len(COLUMNS) - len(first) - 1)]
    return [
        *first,
        f"{row['median']:.4g}",
        f"{row['best']:.4g}",
        "" if row["ratio"] is None else f"**{row['ratio']:.3f}**",
        f"{row['flop_per_second'] / 1e12:.3g}",
        f"{row['share_of_limit']:.2f}",
        "" if row["mfu"] is None else f"{row['mfu']:.3f}",
        f"{row['images_per_second']:.3g}",
        f"{row['compile_seconds']:.1f}",
        f"{row['peak_bytes'] / 2**30:.2f}",
        f"{max(row['errors'].values()):.1e}" if row["errors"] else "",
    ]


def tables(runs: Sequence[dict]) -> str:
    """A table a kind of work over all runs, what failed, and a line of the machine's limits."""
    rows = [row for run in runs for row in run.get("rows", ())]
    parts = []
    for kind, title in KINDS.items():
        if found := [cells(row) for row in rows if row["case"]["kind"] == kind]:
            parts.append(render(COLUMNS, found, title))
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


def limits_line(runs: Sequence[dict]) -> str:
    """The best limits of the machine that the runs measured, and the versions."""
    measured = [run for run in runs if run.get("limits")]
    found = []
    for dtype in dict.fromkeys(dtype for run in measured for dtype in run["limits"]):
        sides = [side for run in measured for side in run["limits"].get(dtype, {}).items()]
        best: dict[str, float] = {}
        for name, limit in sorted(sides, key=lambda side: side[0]):
            best[name] = max(best.get(name, 0), limit["product"])
        products = ", ".join(f"{NAMES[name]} {rate / 1e12:.3g}" for name, rate in best.items())
        copy = max((limit["copy"] for _, limit in sides), default=0)
        side = sides[0][1]["side"] if sides else "?"
        found.append(
            f"{dtype} product of {side}³: {products} TFLOP/s; copy, read and written, "
            f"{copy / 1e9:.3g} GB/s"
        )
    if not found:
        return ""
    last = measured[-1]["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    device = f"{last.get('device', 'this machine')}, {last['cores']} cores"
    return f"Limits of {device}: {'; '.join(found)}. {versions}.\n"


def main(argv: Sequence[str]) -> None:
    if "--part" in argv:
        path, _, part, status, seconds = argv
        noted = {"part": part, "status": status, "seconds": float(seconds)}
        _write(Path(path), [*runs_of(Path(path)), noted])
    else:
        print(tables([run for path in argv for run in runs_of(Path(path))]))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Parity with PyTorch: every model and format with the same random weights on both sides; the
tables of docs/parity.md.

    python benchmarks/parity.py                      every row but the slow ones, and docs/parity.md
    python benchmarks/parity.py --quick              the tiny rows
    python benchmarks/parity.py --only XL/2 --slow   the rows whose name holds XL/2, slow ones too
    python benchmarks/parity.py --check              exit status 1 where a row is over its bound
    python benchmarks/parity.py --list               the rows' names
    python benchmarks/parity.py --document           the document again, without running anything

Each side of a row runs in its own process, one at a time, so that each has all the memory. The
results are kept in parity.json beside the document, one entry a row; the document is written from
it, and rows that a call does not run keep theirs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from benchmarks.parity_rows import ROWS  # noqa: E402
from benchmarks.parity_rows.document import render  # noqa: E402
from benchmarks.parity_rows.row import Row  # noqa: E402
from benchmarks.speed.table import flag_parser  # noqa: E402
from pixart_jax.files import write_json, write_text  # noqa: E402

DOCUMENT = ROOT / "docs" / "parity.md"
COMPARED = ("jax", "flax", "torch", "diffusers", "transformers", "numpy")


def main(argv: list[str] | None = None, rows: tuple[Row, ...] = ROWS) -> int:
    options = _parser().parse_args(argv)
    if options.list:
        print("\n".join(f"{row.tier:5}  {row.name}" for row in rows))
        return 0
    if options.row:
        return _one(options, rows)
    store = options.out.with_suffix(".json")
    results = json.loads(store.read_text()) if store.is_file() else {}
    if options.document:
        write_text(options.out, render(rows, results))
        return 0
    left_out = ({"full", "slow"} if options.quick else set()) | (
        set() if options.slow else {"slow"}
    )
    chosen = [row for row in rows if options.only in row.name and row.tier not in left_out]
    if not chosen:
        return _error(f"no row of these tiers has {options.only!r} in its name (slow ones: --slow)")
    over = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for row in chosen:
        result = results[row.name] = measure(row, options.scratch)
        print(_line(row, result), flush=True)
        if "failed" in result or not row.holds(result["error"]):
            over.append(row.name)
        # the rows' own order; none that no longer exists
        results = {known.name: results[known.name] for known in rows if known.name in results}
        write_json(store, results, indent=1)
        write_text(options.out, render(rows, results))
    held = f"{len(chosen) - len(over)} of {len(chosen)}"
    print(f"{held} rows within their bounds; written: {options.out}")
    if over:
        print("over: " + ", ".join(over))
    return 1 if over and options.check else 0


def _parser() -> argparse.ArgumentParser:
    parser = flag_parser(__doc__)
    add = parser.add_argument
    add("--only", default="", metavar="PATTERN", help="rows whose name holds this")
    add("--quick", action="store_true", help="only the tiny rows")
    add("--slow", action="store_true", help="also rows of more than ten minutes or 8 GB")
    add("--check", action="store_true", help="exit status 1 where a row fails or is over its bound")
    add("--out", type=Path, default=DOCUMENT, help="the document; its figures are beside it")
    add("--scratch", type=Path, help="folder for a row's weights, up to 10 GB")
    add("--document", action="store_true", help="write the document from the results and stop")
    add("--list", action="store_true", help="name the rows and stop")
    add("--row", metavar="NAME", help="run this one row and print one line of JSON")
    add("--side", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def _error(text: str) -> int:
    print(f"error: {text}: --list names them", file=sys.stderr)
    return 2


def _one(options, rows) -> int:
    """--row: one line of JSON; or, in the processes that it starts, the outputs of one side."""
    found = [row for row in rows if row.name == options.row]
    if not found:
        return _error(f"no row {options.row!r}")
    if options.side:
        outputs = getattr(found[0], options.side)(options.folder)
        np.savez(options.folder / f"{options.side}.npz", **outputs)
        return 0
    result = measure(found[0], options.scratch)
    print(json.dumps(result))
    return int("failed" in result)


def measure(row: Row, scratch: Path | None = None) -> dict:
    """Both sides of a row, a process each: {'error', 'versions'}, or {'failed': the last line of
    its output}."""
    quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory(prefix="parity.", dir=scratch) as folder:
        for side in ("theirs", "ours"):
            command = [sys.executable, str(Path(__file__).resolve()), "--row", row.name]
            command += ["--side", side, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, env=quiet | os.environ)
            if done.returncode:
                status = f"exit status {done.returncode}"
                output = done.stderr.strip() or done.stdout.strip() or status
                return {"failed": f"{side}: {output.splitlines()[-1]}"}
        try:
            error = row.compare(*(_outputs(Path(folder), side) for side in ("ours", "theirs")))
        except ValueError as reason:
            return {"failed": str(reason)}
    versions = {name: importlib.metadata.version(name) for name in COMPARED}
    return {
        "error": {key: float(f"{value:.3g}") for key, value in error.items()},
        "versions": {"python": platform.python_version(), **versions},
    }


def _outputs(folder: Path, side: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{side}.npz") as file:
        return dict(file)


def _line(row: Row, result: dict) -> str:
    if "failed" in result:
        return f"FAILED  {row.name}: {result['failed']}"
    error = " ".join(f"{key} {value:g}" for key, value in result["error"].items())
    state = "ok" if row.holds(result["error"]) else "OVER"
    return f"{state:6}  {row.name}: {error} (bound: {row.measure} {row.bound:g})"


if __name__ == "__main__":
    sys.exit(main())

"""Parity with PyTorch: every model and format with the same random weights on both sides; the
tables of docs/parity.md.

    python benchmarks/parity.py                      every row but the slow ones, and docs/parity.md
    anew
    python benchmarks/parity.py --quick              the tiny rows
    python benchmarks/parity.py --only XL/2 --slow   the rows whose name holds XL/2, slow ones too
    python benchmarks/parity.py --check              exit status 1 where a row is over its bound
    python benchmarks/parity.py --list               the rows' names
    python benchmarks/parity.py --document           runs nothing: the document again from what was
    measured

Each side of a row runs in a process of its own, one at a time: memory is free between them, and
peak memory is that side's alone. What was measured lies in parity.json beside the document, one
entry a row; the document is written from it, and rows that a call does not run keep what they had.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
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
from benchmarks.parity_rows.row import Row, Run  # noqa: E402

DOCUMENT = ROOT / "docs" / "parity.md"
COMPARED = ("jax", "flax", "torch", "diffusers", "transformers", "numpy")


def main(argv: list[str] | None = None, rows: tuple[Row, ...] = ROWS) -> int:
    options = _parser().parse_args(argv)
    if options.list:
        print("\n".join(f"{row.tier:5}  {row.name}" for row in rows))
        return 0
    if options.row:
        return _one(options, rows)
    chosen = [
        row
        for row in rows
        if options.only in row.name
        and (row.tier == "quick" or not options.quick)
        and (row.tier != "slow" or options.slow)
    ]
    store = options.out.with_suffix(".json")
    results = json.loads(store.read_text()) if store.is_file() else {}
    if options.document:
        options.out.write_text(render(rows, results))
        return 0
    if not chosen:
        print(
            f"error: no row of these tiers has {options.only!r} in its name: --list names them, "
            "--slow takes slow ones too",
            file=sys.stderr,
        )
        return 2
    over = []
    for row in chosen:
        result = measure(row, options.scratch)
        print(_line(row, result), flush=True)
        if "failed" in result or not row.holds(result["error"]):
            over.append(row.name)
        results[row.name] = result
        # the rows' own order; none that is gone
        results = {known.name: results[known.name] for known in rows if known.name in results}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(results, indent=1) + "\n")
        options.out.write_text(render(rows, results))
    print(
        f"{len(chosen) - len(over)} of {len(chosen)} rows within their bounds; written: "
        f"{options.out}"
    )
    if over:
        print("over: " + ", ".join(over))
    return 1 if over and options.check else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name holds this")
    parser.add_argument("--quick", action="store_true", help="the tiny rows alone")
    parser.add_argument(
        "--slow", action="store_true", help="also the rows that take more than ten minutes or 8 GB"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 where a row fails or is over its bound"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DOCUMENT,
        help="the document; its figures lie beside it as .json",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=None,
        help="where a row's weights lie meanwhile, up to 10 GB (the system's by default)",
    )
    parser.add_argument(
        "--document", action="store_true", help="write the document from what was measured and stop"
    )
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--row", metavar="NAME", help="run this one row and print one line of JSON")
    parser.add_argument("--side", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def _one(options, rows) -> int:
    """--row: one line of JSON, of the whole row or, in the processes that it starts, of one
    side."""
    found = [row for row in rows if row.name == options.row]
    if not found:
        print(f"error: no row {options.row!r}: --list names them", file=sys.stderr)
        return 2
    result = (
        run_side(found[0], options.side, options.folder)
        if options.side
        else measure(found[0], options.scratch)
    )
    print(json.dumps(result))
    return int("failed" in result)


def measure(row: Row, scratch: Path | None = None) -> dict:
    """Both sides of a row, a process each: {'error', 'seconds', 'peak_bytes', 'versions'}, or
    {'failed': the last line it said}."""
    with tempfile.TemporaryDirectory(prefix="parity.", dir=scratch) as folder:
        sides = {}
        for side in ("theirs", "ours"):
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--row",
                row.name,
                "--side",
                side,
                "--folder",
                folder,
            ]
            env = {
                "JAX_PLATFORMS": "cpu",
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_VERBOSITY": "error",
                **os.environ,
            }
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            if done.returncode:
                said = (
                    done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
                ).splitlines()[-1]
                return {"failed": f"{side}: {said}"}
            sides[side] = json.loads(done.stdout.strip().splitlines()[-1])
        try:
            error = row.compare(*(_outputs(Path(folder), side) for side in ("ours", "theirs")))
        except ValueError as fault:
            return {"failed": str(fault)}
    result = {"error": {key: float(f"{value:.3g}") for key, value in error.items()}}
    for key in ("seconds", "peak_bytes"):
        result[key] = {side: sides[side][key] for side in sides}
    return result | {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in COMPARED}
    }


def run_side(row: Row, side: str, folder: Path) -> dict:
    """One side in this process: its outputs go to a file in the folder, its time and memory are
    returned."""
    run: Run = getattr(row, side)(folder)
    np.savez(folder / f"{side}.npz", **run.outputs)
    seconds = None if run.seconds is None else float(f"{run.seconds:.3g}")
    return dataclasses.asdict(Run({}, seconds)) | {"peak_bytes": peak_bytes()}


def _outputs(folder: Path, side: str) -> dict[str, np.ndarray]:
    with np.load(folder / f"{side}.npz") as file:
        return dict(file)


def peak_bytes() -> int:
    """The largest resident set of this process, mapped pages of weight files included."""
    # the resource module's figure outlives exec on Linux: a child of a large process would show its
    # parent's
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def _line(row: Row, result: dict) -> str:
    if "failed" in result:
        return f"FAILED  {row.name}: {result['failed']}"
    error = " ".join(f"{key} {value:g}" for key, value in result["error"].items())
    return (
        f"{'ok' if row.holds(result['error']) else 'OVER':6}  {row.name}: {error} (bound: "
        f"{row.measure} {row.bound:g})"
    )


if __name__ == "__main__":
    sys.exit(main())

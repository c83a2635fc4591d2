"""The demo's recipe from several seeds, scored: the table of docs/shapes.md.

    python benchmarks/shapes_seeds.py --seeds 0 1 2 --out runs/seeds

Each seed is a whole training run (minutes); what is already there is not trained again. Writes
table.md beside the runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def train_and_score(config: str, seed: int, out: Path, per_task: int) -> dict:
    """{task: score} of one seed, and its training time under 'seconds'."""
    workdir = out / f"seed-{seed}"
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "train.py", config, "--workdir", str(workdir), "--seed", str(seed)],
        cwd=ROOT,
        check=True,
    )
    seconds = time.perf_counter() - start
    command = [
        sys.executable,
        "-m",
        "pixart_jax",
        "evaluate",
        "shapes",
        "--model",
        str(workdir / "model"),
        "--out",
        str(workdir / "score"),
    ]
    subprocess.run([*command, "--per-task", str(per_task)], cwd=ROOT, check=True)
    found = json.loads((workdir / "score" / "score.json").read_text())
    return {name: task["score"] for name, task in found["tasks"].items()} | {"seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/shapes_demo.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args()
    out = options.out.absolute()
    runs = [train_and_score(options.config, seed, out, options.per_task) for seed in options.seeds]
    lines = [
        f"| task | {' | '.join(f'seed {s}' for s in options.seeds)} | mean |",
        f"|---|{'---|' * (len(runs) + 1)}",
    ]
    for name in runs[0]:
        values = [run[name] for run in runs]
        form = "{:.0f}" if name == "seconds" else "{:.3f}"
        lines.append(
            f"| {name} | {' | '.join(form.format(v) for v in values)} | "
            f"{form.format(statistics.mean(values))} |"
        )
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), f"\nwritten: {out / 'table.md'}", sep="\n")


if __name__ == "__main__":
    main()

"""The demo's recipe from several seeds, scored: the table of docs/shapes.md.

    python benchmarks/shapes_seeds.py --seeds 0 1 2 --out runs/seeds

Each seed is a whole training run (minutes); a run that is complete is not trained again. Writes
table.md beside the runs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser, table  # noqa: E402


def train_and_score(config: str, seed: int, out: Path, per_task: int) -> dict[str, float]:
    """{task: score} of one seed, and its training time under 'seconds'."""
    workdir = out / f"seed-{seed}"

    def run(*arguments) -> None:
        subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)

    begun = time.perf_counter()
    run("train.py", config, "--workdir", workdir, "--seed", seed)
    seconds, score = time.perf_counter() - begun, workdir / "score"
    evaluate = ("-m", "pixart_jax", "evaluate", "shapes", "--per-task", per_task)
    run(*evaluate, "--model", workdir / "model", "--out", score)
    tasks = json.loads((score / "score.json").read_text())["tasks"]
    return {name: task["score"] for name, task in tasks.items()} | {"seconds": seconds}


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--config", default="configs/shapes_demo.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args()
    out = options.out.absolute()
    runs = [train_and_score(options.config, seed, out, options.per_task) for seed in options.seeds]
    rows = []
    for name in runs[0]:
        values = [run[name] for run in runs]
        form = ".0f" if name == "seconds" else ".3f"
        rows.append([name, *(format(value, form) for value in (*values, statistics.mean(values)))])
    text = table(["task", *(f"seed {seed}" for seed in options.seeds), "mean"], rows)
    (out / "table.md").write_text(text)
    print(f"{text}\nwritten: {out / 'table.md'}")


if __name__ == "__main__":
    main()

"""The shipped model under six guidances: accuracy by the exact checker, FID with a random network,
and the floors of both; then a simulated user study of it and the model of `make demo`.

    python benchmarks/evaluation_shapes.py --out runs/evaluation --other runs/demo/model

Runs the commands that a user would: sample.py, `evaluate shapes`, `evaluate fid` and `evaluate
study`. A point that is finished is kept. The Inception features of 256 images take two minutes on
two CPU cores. Writes table.md, curves.png and study/ to --out.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser, table  # noqa: E402
from pixart_jax.data import shapes  # noqa: E402
from pixart_jax.evaluation.checker import find_objects  # noqa: E402
from pixart_jax.evaluation.tasks import ALL, EvalPrompt, eval_prompts, judge, unit  # noqa: E402
from pixart_jax.files import write_text  # noqa: E402
from pixart_jax.images import write_png  # noqa: E402

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0)


def call(*arguments) -> None:
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=True)


def scenes(count: int, groups: int = 2) -> list[list[EvalPrompt]]:
    """Groups of ``count`` scenes each, of three tasks by turns; no scene is in two groups."""
    per_task = -(-count * groups // 3)
    listed = eval_prompts("plain", per_task, sets=("single", "count", "pair"))
    turns = [
        prompt
        for row in zip(*(listed[k * per_task :][:per_task] for k in range(3)))
        for prompt in row
    ]
    return [turns[k * count :][:count] for k in range(groups)]


def renders(folder: Path, prompts: list[EvalPrompt]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n, prompt in enumerate(prompts):
        if not (path := folder / f"{n:04d}.png").exists():
            write_png(path, shapes.render(prompt.scene))
    return folder


def evaluate(what: str, out: Path, *flags) -> dict:
    """The score.json of `evaluate WHAT`; a finished one is kept."""
    if not (out / "score.json").exists():
        call("-m", "pixart_jax", "evaluate", what, *flags, "--out", out)
    return json.loads((out / "score.json").read_text())


def fid(images: Path, reference: Path, out: Path) -> dict:
    return evaluate("fid", out, images, "--reference", reference, "--random-inception", 0)


def report(rows: list[tuple[float, dict, dict]], floor: dict, out: Path) -> None:
    """table.md and curves.png."""
    columns = ["guidance", "six tasks", "floor", "95%", "binding", "FID (random Inception)", "95%"]
    body = []
    for guidance, shape, distance in rows:
        mean, (low, high) = shape["mean"], distance["interval"]
        body.append(
            [
                f"{guidance:g}",
                f"{mean['score']:.3f}",
                f"{mean['floor']:.3f}",
                f"{mean['low']:.3f} – {mean['high']:.3f}",
                f"{shape['tasks']['binding']['score']:.3f}",
                f"{distance['value']:.2f}",
                f"{low:.2f} – {high:.2f}",
            ]
        )
    body.append(["true renders", "", "", "", "", f"{floor['value']:.2f}", ""])
    write_text(out / "table.md", table(columns, body))
    figure = Figure((8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = [guidance for guidance, *_ in rows]
    tasks = {"mean of the six main tasks": "mean", "binding": "binding"}
    for (name, key), colour in zip(tasks.items(), ("#3b6ea5", "#c07830")):
        of = [shape["mean"] if key == "mean" else shape["tasks"][key] for _, shape, _ in rows]
        left.plot(x, [task["score"] for task in of], marker="o", color=colour, label=name)
        left.fill_between(
            x, [t["low"] for t in of], [t["high"] for t in of], color=colour, alpha=0.15, lw=0
        )
        floors = [task["floor"] for task in of]
        left.plot(x, floors, linestyle="--", color=colour, label="its floor, shuffled captions")
    left.set_ylim(0, 1.02)
    left.set_title("accuracy by the checker", fontsize=10)
    right.plot(x, [d["value"] for *_, d in rows], marker="o", color="#3b6ea5", label="generated")
    ends = zip(*(d["interval"] for *_, d in rows))
    right.fill_between(x, *ends, color="#3b6ea5", alpha=0.15, lw=0)
    right.axhline(floor["value"], linestyle="--", color="#3b6ea5", label="floor, true renders")
    right.set_ylim(bottom=0)
    right.set_title(f"FID, random Inception, {floor['n']['generated']} images", fontsize=10)
    for axes in (left, right):
        axes.set_xlabel("guidance")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(out / "curves.png", dpi=120, metadata={"Software": None})


def simulated_study(folders: list[Path], prompts: list[EvalPrompt], out: Path) -> None:
    """Build a study, let a simulated rater answer each sheet, and report.

    A rater sees what the page shows: pixels and texts, in which the checker finds whether all is
    right (alignment) and how clear the shapes are (quality). Rater n answers with noise of its own,
    and prefers the left a little.
    """
    if not (out / "key.json").exists():
        call("-m", "pixart_jax", "evaluate", "study", "build", *folders, "--out", out,
             "--per-rater", 40)  # fmt: skip
    page = json.loads((out / "page/trials.js").read_text()[len("const STUDY = ") : -len(";\n")])
    scenes_of = {prompt.caption: prompt for prompt in prompts}

    @functools.cache
    def found(image: str) -> tuple:
        with Image.open(out / "page/pictures" / f"{image}.png") as file:
            return tuple(find_objects(np.asarray(file)))

    def good(image: str, text: str | None) -> float:
        if text is None:
            return 12 * min((one.confidence for one in found(image)), default=0.5)
        asked = scenes_of[text]
        size = unit(asked.scene, min(asked.scene.height, asked.scene.width))
        return 4.0 * judge(asked.set, asked.scene, list(found(image)), size)[ALL]

    votes = []
    for rater, sheet in enumerate(page["sheets"]):
        rng = np.random.default_rng(rater)
        noise, left_habit = rng.uniform(0.7, 1.5), rng.normal(0.1, 0.1)
        for trial in (trial for part in sheet for trial in part["trials"]):
            shown = page["trials"][trial]
            left, right = rng.permutation(shown["images"])
            better = good(left, shown.get("text")) - good(right, shown.get("text"))
            if abs(better) < 0.3 and rng.random() < 0.7:
                answer = "tie"
            else:
                odds = better / noise + left_habit
                answer = "left" if rng.random() < 1 / (1 + np.exp(-odds)) else "right"
            who = {"trial": trial, "rater": f"rater {rater}"}
            votes.append({**who, "left": left, "answer": answer})
    lines = out / "votes.jsonl"
    write_text(lines, "".join(json.dumps(vote) + "\n" for vote in votes))
    call("-m", "pixart_jax", "evaluate", "study", "report", "--votes", lines, "--study", out,
         "--out", out / "score")  # fmt: skip


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--guidances", type=float, nargs="+", default=GUIDANCES)
    parser.add_argument("--images", type=int, default=256, help="of each side of an FID")
    parser.add_argument("--per-task", type=int, default=200, help="images a set of the accuracy")
    parser.add_argument("--study", type=float, default=2.0, help="guidance of the user study")
    parser.add_argument("--other", default="runs/demo/model", help="its other model")
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    options = parser.parse_args()
    out = options.out.absolute()
    prompts, held_out = scenes(options.images)
    reference = renders(out / "reference", held_out)
    floor = fid(renders(out / "renders", prompts), reference, out / "fid-renders")
    listed = out / "prompts.txt"
    listed.write_text("".join(f"{prompt.caption}\n" for prompt in prompts))
    rows = []
    for guidance in options.guidances:
        images = out / f"guidance-{guidance:g}"
        if not (out / f"fid-{guidance:g}" / "score.json").exists():
            call("sample.py", "--prompts", listed, "--guidance", guidance, "--out", images)
        flags = "--guidance", guidance, "--per-task", options.per_task
        shape = evaluate("shapes", out / f"shapes-{guidance:g}", *flags)
        distance = fid(images, reference, out / f"fid-{guidance:g}")
        rows.append((guidance, shape, distance))
    report(rows, floor, out)
    print((out / "table.md").read_text())
    other = out / "other"
    call("sample.py", "--model", options.other, "--prompts", listed, "--guidance", options.study,
         "--out", other)  # fmt: skip
    simulated_study([out / f"guidance-{options.study:g}", other], prompts, out / "study")


if __name__ == "__main__":
    main()

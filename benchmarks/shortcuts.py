"""What the sampling options that trade quality for speed gain and cost, on the shapes model.

    python benchmarks/shortcuts.py --out runs/shortcuts
    python benchmarks/shortcuts.py --rows 1 --student runs/shapes_lcm/model      and a student alone

Every row generates the same scenes from the same noise as `python -m pixart_jax evaluate shapes`; a
student of few steps (docs/few_steps.md), by default the shipped one, with its own settings.
*ratio*: seconds of the plain run of 20 steps over seconds of the row, medians of batches in turn,
without the text encoder. *distance*: root mean square, from the plain run's images in [0, 1].
Writes the table to OUT/table.md and all figures to OUT/shortcuts.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser, table, tell  # noqa: E402
from pixart_jax import Pipeline  # noqa: E402
from pixart_jax.evaluation.shapes_score import score  # noqa: E402
from pixart_jax.evaluation.tasks import eval_prompts  # noqa: E402
from pixart_jax.files import write_json, write_text  # noqa: E402
from pixart_jax.pipeline import SamplingConfig  # noqa: E402
from pixart_jax.pipeline.block_cache import make_plan  # noqa: E402

TASKS = ("colour", "shape", "counting", "position", "binding")
STUDENT = ROOT / "assets" / "shapes-4step"
COLUMNS = ("generated with", "computed", "seconds an image", "ratio", "distance", *TASKS)
# name: (steps, fields of SamplingConfig)
ROWS: dict[str, tuple[int, dict]] = {
    **{f"{steps} steps": (steps, {}) for steps in (20, 14, 10, 8, 6, 4)},
    **{
        f"20 steps, guided from {high} to {low}": (20, {"guidance_interval": (low, high)})
        for low, high in ((400, 999), (700, 999), (300, 900))
    },
    **{f"20 steps, text for {n}": (20, {"cross_attention_steps": n}) for n in (12, 8, 5)},
    "20 steps, blocks every 2nd": (20, {"blocks_every": 2}),
    "20 steps, blocks every 3rd": (20, {"blocks_every": 3}),
    "20 steps, blocks every 2nd, text for 8": (20, {"cross_attention_steps": 8, "blocks_every": 2}),
    "10 steps, guided from 999 to 400": (10, {"guidance_interval": (400, 999)}),
}


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--model", default="assets/shapes")
    parser.add_argument("--student", type=Path, default=STUDENT if STUDENT.exists() else None)
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="images a batch")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", type=int, default=len(ROWS), help="only the first so many rows")
    parser.add_argument("--out", type=Path, default=Path("runs/shortcuts"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_pretrained(options.model)
    rows = {name: (pipe, *how) for name, how in list(ROWS.items())[: options.rows]}
    if options.student:
        student = Pipeline.from_pretrained(options.student)
        steps = int(student.sampling.with_defaults().steps or 0)
        rows[f"{options.student.name}, {steps} steps"] = (student, steps, {})
    seconds = timed(rows, options.batch, options.repeat)
    prompts, found, plain = eval_prompts("plain", options.per_task, "short"), [], None
    for name, (pipe, steps, fields) in rows.items():
        own = pipe.sampling.with_defaults()
        config, guided = SamplingConfig(steps, **fields).with_defaults(), own.guidance != 1
        images = pipe([p.caption for p in prompts], steps=steps, **fields, batch_size=options.batch)
        plain = images if plain is None else plain
        tasks = score(prompts, list(images)).tasks
        plan = make_plan(config, pipe.transformer.config, pipe.scheduler, guided=guided)
        found.append(
            {
                "name": name,
                "computed": plan.share * steps / 20,
                "seconds_an_image": seconds[name],
                "ratio": seconds["20 steps"] / seconds[name],
                "distance": float(np.sqrt(np.mean(((images.astype(float) - plain) / 255) ** 2))),
                "tasks": {task: tasks[task].score for task in TASKS},
            }
        )
        tell(" | ".join(cells(found[-1])))
    text = table(COLUMNS, [cells(row) for row in found])
    write_text(options.out / "table.md", text)
    write_json(options.out / "shortcuts.json", found, indent=1)
    print(f"{text}\nwritten: {options.out / 'table.md'}")


def cells(row: dict) -> list[str]:
    forms = {"computed": ".2f", "seconds_an_image": ".4f", "ratio": ".2f", "distance": ".3f"}
    figures = [format(row[name], form) for name, form in forms.items()]
    return [row["name"], *figures, *(f"{row['tasks'][task]:.2f}" for task in TASKS)]


def timed(rows: dict, batch: int, repeat: int) -> dict[str, float]:
    """Median seconds an image of each row, batch by batch in turn, after one that compiles."""
    prompts = ["a large red star left of a small blue circle"] * batch
    states = {name: pipe.encode_prompts([*prompts, ""]) for name, (pipe, *_) in rows.items()}
    found: dict[str, list[float]] = {name: [] for name in rows}
    for n in range(repeat + 1):
        for name, (pipe, steps, fields) in rows.items():
            begun = time.perf_counter()
            pipe(prompts, steps=steps, **fields, text_states=states[name], seed=n)
            if n:
                found[name].append((time.perf_counter() - begun) / batch)
    return {name: statistics.median(times) for name, times in found.items()}


if __name__ == "__main__":
    main()

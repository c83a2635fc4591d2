"""What a drawing's shortcuts gain and cost, on the shapes model: seconds an image, distance from
the whole image, and the tasks' scores.

    python benchmarks/shortcuts.py --out runs/shortcuts

Every row draws the same scenes from the same noise (`python -m pixart_jax evaluate shapes` draws
and judges them). *ratio*: seconds of the plain run of 20 steps over seconds of the row, medians of
batches drawn in turn, the text encoder left out. *distance*: of the images in [0, 1] from the plain
run's, root mean square. The table is printed and written to OUT/table.md, all figures to
OUT/shortcuts.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import numpy as np

from pixart_jax import Pipeline
from pixart_jax.diffusion import timesteps
from pixart_jax.evaluation.shapes_score import score
from pixart_jax.evaluation.tasks import eval_prompts
from pixart_jax.pipeline import CacheConfig

TASKS = ("colour", "shape", "counting", "position", "binding")


@dataclasses.dataclass(frozen=True)
class Row:
    """A way to draw."""

    name: str
    steps: int = 20
    shortcuts: CacheConfig = CacheConfig()


ROWS = (
    Row("20 steps"),
    Row("14 steps", 14),
    Row("10 steps", 10),
    Row("8 steps", 8),
    Row("6 steps", 6),
    Row("4 steps", 4),
    Row("20 steps, guided from 999 to 400", shortcuts=CacheConfig(guidance_interval=(400, 999))),
    Row("20 steps, guided from 999 to 700", shortcuts=CacheConfig(guidance_interval=(700, 999))),
    Row("20 steps, guided from 900 to 300", shortcuts=CacheConfig(guidance_interval=(300, 900))),
    Row("20 steps, text for 12", shortcuts=CacheConfig(cross_attention_steps=12)),
    Row("20 steps, text for 8", shortcuts=CacheConfig(cross_attention_steps=8)),
    Row("20 steps, text for 5", shortcuts=CacheConfig(cross_attention_steps=5)),
    Row("20 steps, blocks every 2nd", shortcuts=CacheConfig(blocks_every=2)),
    Row("20 steps, blocks every 3rd", shortcuts=CacheConfig(blocks_every=3)),
    Row(
        "20 steps, blocks every 2nd, text for 8",
        shortcuts=CacheConfig(cross_attention_steps=8, blocks_every=2),
    ),
    Row("10 steps, guided from 999 to 400", 10, CacheConfig(guidance_interval=(400, 999))),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="assets/shapes")
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument(
        "--batch", type=int, default=16, help="images drawn at once while the clock runs"
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--rows", type=int, default=len(ROWS), help="the first so many rows alone")
    parser.add_argument("--out", type=Path, default=Path("runs/shortcuts"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    pipe, rows = Pipeline.from_pretrained(options.model), ROWS[: options.rows]
    seconds = timed(pipe, rows, options.batch, options.repeat)
    wanted = eval_prompts("plain", options.per_task, "short")
    made, plain = [], None
    for row in rows:
        images = drawn(pipe, row, wanted, options.batch)
        plain = images if plain is None else plain
        tasks = score(wanted, list(images)).tasks
        share = (
            row.shortcuts.plan(
                timesteps("dpm++", row.steps), pipe.transformer.config.depth, True
            ).share
            * row.steps
            / rows[0].steps
        )
        made.append(
            {
                "name": row.name,
                "seconds_an_image": seconds[row.name],
                "ratio": seconds[rows[0].name] / seconds[row.name],
                "computed": share,
                "distance": float(
                    np.sqrt(np.mean(((images.astype(np.float64) - plain) / 255) ** 2))
                ),
                "tasks": {name: tasks[name].score for name in TASKS},
            }
        )
        print(line(made[-1]), flush=True)
    lines = [
        f"| drawn with | computed | seconds an image | ratio | distance | {' | '.join(TASKS)} |",
        f"|---|---|---|---|---|{'---|' * len(TASKS)}",
        *map(line, made),
    ]
    (options.out / "table.md").write_text("\n".join(lines) + "\n")
    (options.out / "shortcuts.json").write_text(json.dumps(made, indent=1) + "\n")
    print("\n".join(["", *lines, "", f"written: {options.out / 'table.md'}"]))


def line(row: dict) -> str:
    """A row of the table."""
    figures = (
        f"{row['computed']:.2f} | {row['seconds_an_image']:.4f} | {row['ratio']:.2f} | "
        f"{row['distance']:.3f}"
    )
    tasks = " | ".join(f"{row['tasks'][name]:.2f}" for name in TASKS)
    return f"| {row['name']} | {figures} | {tasks} |"


def timed(pipe: Pipeline, rows, batch: int, repeat: int) -> dict[str, float]:
    """Median seconds an image of each row, batch by batch in turn, compiled before."""
    prompts = ["a large red star left of a small blue circle"] * batch
    states = pipe.encode_prompts([*prompts, ""])
    found: dict[str, list[float]] = {row.name: [] for row in rows}
    for n in range(repeat + 1):
        for row in rows:
            begun = time.perf_counter()
            pipe(prompts, steps=row.steps, shortcuts=row.shortcuts, text_states=states, seed=n)
            if n:
                found[row.name].append((time.perf_counter() - begun) / batch)
    return {name: statistics.median(times) for name, times in found.items()}


def drawn(pipe: Pipeline, row: Row, wanted, batch: int) -> np.ndarray:
    """uint8 [n, h, w, 3], a scene's noise its own."""
    return pipe(
        [a.caption for a in wanted], steps=row.steps, shortcuts=row.shortcuts, batch_size=batch
    )


if __name__ == "__main__":
    main()

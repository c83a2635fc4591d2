"""Quality over evaluations of the model: the shipped teacher by every solver, and its students, by
the exact checker on the same scenes and noise; and variety, the standard deviation of a pixel (of
255) over the seeds of a prompt, which tells samples from their mean.

    python benchmarks/shapes_steps.py --out runs/steps --student LCM=runs/shapes_lcm/model \\
        --student TDM=runs/shapes_tdm/model --student LCM-LoRA=assets/shapes:runs/lora/adapter

Every point is a folder of --out with the score of `evaluate shapes`; those that are there are not
computed again. Writes LEVEL.md and LEVEL.png.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser, table, tell  # noqa: E402
from pixart_jax import Pipeline, plots  # noqa: E402
from pixart_jax.diffusion import solvers  # noqa: E402
from pixart_jax.evaluation.command import ShapesOptions, evaluate_shapes  # noqa: E402
from pixart_jax.evaluation.tasks import eval_prompts  # noqa: E402
from pixart_jax.files import write_json, write_text  # noqa: E402
from pixart_jax.pipeline.sampling_config import STEPS, SamplingConfig  # noqa: E402

TASKS = ("shape", "counting", "position", "both shapes", "binding", "withheld: binding")


@dataclasses.dataclass(frozen=True)
class Point:
    """A curve's model, with an adapter or None, at a solver, steps and guidance."""

    curve: str
    model: str
    lora: str | None
    solver: str
    steps: int
    guidance: float

    @property
    def evaluations(self) -> int:
        """Of the model, an image."""
        passes = 2 * self.steps - 1 if self.solver == "heun" else self.steps
        return passes * (1 if self.guidance == 1 else 2)

    @property
    def name(self) -> str:
        return f"{self.curve}-{self.solver}-{self.steps}-{self.guidance:g}".replace(" ", "_")


def points(options) -> list[Point]:
    """The teacher's, guided and not, by every solver that is not of students; each student's by its
    own."""
    found = []
    for solver in [name for name in solvers.NAMES if name not in STEPS]:
        for steps in options.steps:
            found.append(Point(f"{solver}, guided", options.model, None, solver, steps, 2.0))
    for steps in options.steps:
        found.append(Point("dpm++, unguided", options.model, None, "dpm++", steps, 1.0))
    for text in options.student:
        name, _, folder = text.partition("=")
        model, _, lora = folder.partition(":")
        own = Pipeline.from_pretrained(model, text_encoder=False).sampling
        solver = "lcm" if lora else str(own.solver)
        counts = options.student_steps if solver == "lcm" else (int(own.steps or 4),)
        found += [Point(name, model, lora or None, solver, steps, 1.0) for steps in counts]
    return found


def score(point: Point, options) -> dict:
    """The point's scores and seconds an image, from its folder or computed."""
    file = options.out / options.level / point.name / "point.json"
    if file.exists():
        return json.loads(file.read_text())
    tell(point.name)
    pipe = Pipeline.from_pretrained(point.model)
    if point.lora:
        pipe.load_lora_weights(point.lora)
    sampling = SamplingConfig(point.steps, guidance=point.guidance, solver=point.solver)
    how = ShapesOptions(
        model=point.model,
        level=options.level,
        per_task=options.count,
        sampling=sampling,
        out=file.parent,
    )
    begun = time.perf_counter()
    found = evaluate_shapes(how, pipe)
    seconds = (time.perf_counter() - begun) / len(found.verdicts)
    tasks = {name: [t.score, t.low, t.high] for name, t in found.tasks.items()}
    spread = variety(pipe, sampling, options.level)
    write_json(file, {"tasks": tasks, "seconds an image": seconds, "variety": spread})
    return json.loads(file.read_text())


def variety(pipe: Pipeline, sampling: SamplingConfig, level: str, seeds: int = 8) -> float:
    """Mean standard deviation of a pixel over the seeds of a prompt; 32 prompts of two objects."""
    prompts = [one.caption for one in eval_prompts(level, 32, sets=("pair",))][:32]
    made = pipe.generate(prompts, sampling, num_images_per_prompt=seeds, batch_size=32)
    images = np.concatenate([batch for _, batch in made]).astype(np.float32)
    return float(images.reshape(len(prompts), seeds, -1).std(axis=1).mean())


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--model", default=str(ROOT / "assets" / "shapes"))
    parser.add_argument("--student", action="append", default=[])
    parser.add_argument("--steps", type=int, nargs="*", default=[1, 2, 4, 8, 20])
    parser.add_argument("--student-steps", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--level", default="plain")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows, curves = [], {}
    for point in points(options):
        scored = score(point, options)
        found = scored["tasks"]
        cells = [f"{found[name][0]:.3f}" if name in found else "" for name in TASKS]
        how = f"{point.solver} {point.steps}", f"{point.guidance:g}", str(point.evaluations)
        rows.append([point.curve, *how, *cells, f"{scored['variety']:.1f}"])
        if "binding" in found:
            curve = curves.setdefault(point.curve, ([], []))
            curve[0].append(point.evaluations)
            curve[1].append(found["binding"][0])
        write_text(
            options.out / f"{options.level}.md",
            table(["model", "sampler", "guidance", "evaluations", *TASKS, "variety"], rows),
        )
    plots.curves(
        options.out / f"{options.level}.png",
        curves,
        title=f"binding, level {options.level}",
        axis="evaluations of the model",
    )
    print((options.out / f"{options.level}.md").read_text())


if __name__ == "__main__":
    main()

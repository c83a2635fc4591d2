"""A new object for the shipped model: the heart, which its transformer never saw, from five
pictures in five colours (DreamBooth, full or as a LoRA), scored by the exact checker.

    python benchmarks/shapes_subject.py --out runs/subject --ranks 1 2 4 8 --full

For each run: the heart alone in the three colours that no picture shows, the heart as one of two
objects, and the tasks of `evaluate shapes` beside those of the untouched model. --word heart is
known to the text encoder, zwx is a spare word of the tokenizer. Finished runs are not repeated.
Further flags go to train.py. Writes table.md and a sheet of images to --out.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.speed.table import flag_parser, table, tell  # noqa: E402
from pixart_jax import Pipeline  # noqa: E402
from pixart_jax.data import shapes  # noqa: E402
from pixart_jax.evaluation.checker import find_objects, relation  # noqa: E402
from pixart_jax.evaluation.command import ShapesOptions, evaluate_shapes  # noqa: E402
from pixart_jax.evaluation.tasks import eval_prompts  # noqa: E402
from pixart_jax.images import image_grid, write_png  # noqa: E402

SEEN, UNSEEN = list(shapes.COLOURS)[:5], list(shapes.COLOURS)[5:]


def write_subject(folder: Path, word: str) -> None:
    """Five pictures of hearts, large and small, each with its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, colour in enumerate(SEEN):
        size = list(shapes.SIZES)[n % 2]
        rng = np.random.default_rng([11, n])
        scene = shapes.draw_scene(rng, "lit", task="single", canvas=(64, 64))
        (old,) = scene.objects
        radius = shapes.SIZES[size]
        heart = dataclasses.replace(old, shape="heart", colour=colour, size=size, radius=radius)
        scene = dataclasses.replace(scene, objects=(heart,))
        write_png(folder / f"{n}.png", shapes.render(scene))
        (folder / f"{n}.txt").write_text(f"a {size} {colour} {word}")


def write_class_prompts(path: Path, count: int) -> None:
    """Captions of training scenes: what the model is to keep."""
    scenes = (shapes.scene_at("plain", "train", n) for n in range(count))
    path.write_text("\n".join(shapes.captions(scene)["short"] for scene in scenes))


def alone(count: int) -> list[tuple[str, str]]:
    """(size, colour) of prompts for the heart alone, in colours that no picture shows."""
    return list(itertools.islice(itertools.cycle(itertools.product(shapes.SIZES, UNSEEN)), count))


def score(pipe: Pipeline, word: str, count: int, out: Path) -> dict[str, float]:
    """The shares of right images, and a sheet of some of them."""
    singles = alone(count)
    prompts = [f"a {size} {colour} {word}" for size, colour in singles]
    images = pipe(prompts, seed=1)
    found = [find_objects(image) for image in images]
    right = [
        bool(f) and (f[0].colour, f[0].shape) == (colour, "heart")
        for f, (_, colour) in zip(found, singles)
    ]
    scenes = [p.scene for p in eval_prompts("plain", count, sets=("pair",))]
    texts, bound = [], []
    for n, scene in enumerate(scenes):
        first, second = scene.objects
        colours = [c for c in SEEN + UNSEEN if c != second.colour]
        first = dataclasses.replace(first, shape="heart", colour=colours[n % len(colours)])
        scenes[n] = dataclasses.replace(scene, objects=(first, second))
        texts.append(shapes.captions(scenes[n])["short"].replace("heart", word))
    pairs = pipe(texts, seed=1)
    for scene, image in zip(scenes, pairs):
        first, second = scene.objects
        seen = find_objects(image)
        a = [f for f in seen if (f.colour, f.shape) == (first.colour, "heart")]
        b = [f for f in seen if (f.colour, f.shape) == (second.colour, second.shape)]
        bound.append(bool(a and b) and relation(a[0], b[0]) == scene.relation)
    shown = [*zip(images[:8], prompts, right), *zip(pairs[:8], texts, bound)]
    pictures, captions, marks = (list(column) for column in zip(*shown))
    write_png(out, image_grid(pictures, captions, marks=marks))
    shares = {"alone, unseen colours": right, "one of a pair": bound}
    return {name: float(np.mean(values)) for name, values in shares.items()}


def train(out: Path, data: Path, prompts: Path, options, rank: int | None) -> tuple[Path, float]:
    """The run of one rank, None for all weights: (its folder, seconds)."""
    workdir = out / ("full" if rank is None else f"rank-{rank}")
    begun = time.perf_counter()
    argv = ["configs/dreambooth.py", "--workdir", workdir, "--base", options.model]
    argv += ["--stages.0.data.source", f"folder:{data}", "--dreambooth.prompt", "None"]
    argv += ["--dreambooth.identifier", options.word, "--preview.every", "0"]
    argv += ["--stages.0.steps", options.steps, "--stages.0.batch-size", options.batch]
    argv += ["--stages.0.optimizer.ema", "0.995"]
    if not options.no_prior:
        argv += ["--dreambooth.class-prompt", f"file:{prompts}", "--dreambooth.class-folder"]
        argv += [out.parent / "class_images", "--dreambooth.class-images", options.class_images]
    if rank is None:
        argv += ["--stages.0.optimizer.learning-rate", options.full_rate]
    else:
        argv += ["--lora.rank", rank, "--stages.0.optimizer.learning-rate", options.lora_rate]
    argv += options.more
    # two devices use two CPU cores better than one (Makefile)
    speed = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    speed["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    command = [sys.executable, "train.py", *map(str, argv)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | speed)
    return workdir, time.perf_counter() - begun


def main() -> None:
    parser = flag_parser(__doc__)
    parser.add_argument("--model", default=str(ROOT / "assets" / "shapes"))
    parser.add_argument("--word", default="heart")
    parser.add_argument("--ranks", type=int, nargs="*", default=[4])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--no-prior", action="store_true")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--class-images", type=int, default=1000)
    parser.add_argument("--lora-rate", type=float, default=5e-3)
    parser.add_argument("--full-rate", type=float, default=1e-3)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options, options.more = parser.parse_known_args()
    out = (options.out / (options.word + "-alone" * options.no_prior)).resolve()
    write_subject(data := out / "subject", options.word)
    write_class_prompts(prompts := out.parent / "class_prompts.txt", options.class_images)
    base = Pipeline.from_pretrained(options.model)
    runs: dict[str, dict[str, float]] = {"untouched": old_tasks(base, out / "untouched", options)}
    for rank in [*options.ranks, *([None] if options.full else [])]:
        workdir, seconds = train(out, data, prompts, options, rank)
        if not (path := workdir / "scores.json").exists():
            pipe = Pipeline.from_pretrained(workdir / "model" if rank is None else options.model)
            if rank is not None:
                pipe.load_lora_weights(workdir / "adapter")
            tell(f"{workdir.name}: scoring")
            found = score(pipe, options.word, options.count, out / f"{workdir.name}.png")
            found |= old_tasks(pipe, workdir, options) | {"seconds": seconds}
            path.write_text(json.dumps(found))
        name = "all weights" if rank is None else f"rank {rank}"
        runs[name] = json.loads(path.read_text())
        write_table(runs, out / "table.md")
    print((out / "table.md").read_text())


def old_tasks(pipe: Pipeline, out: Path, options) -> dict[str, float]:
    """The scores of ``evaluate shapes``, computed once."""
    path = out / "tasks.json"
    if not path.exists():
        how = ShapesOptions(model=options.model, per_task=options.count, out=out / "score")
        tasks = evaluate_shapes(how, pipe).tasks
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: task.score for name, task in tasks.items()}))
    return json.loads(path.read_text())


def write_table(runs: dict[str, dict[str, float]], path: Path) -> None:
    """A column a run; the old tasks also as the largest loss against the untouched model."""
    new = ("alone, unseen colours", "one of a pair")
    old = list(runs["untouched"])

    def cell(run: dict[str, float], name: str) -> str:
        return f"{run[name]:.3f}" if name in run else ""

    rows = [[name, *(cell(run, name) for run in runs.values())] for name in (*new, *old)]
    losses = [max(runs["untouched"][n] - run[n] for n in old) for run in runs.values()]
    rows.append(["largest loss of an old task", *(f"{loss:.3f}" for loss in losses)])
    path.write_text(table(["task", *runs], rows))


if __name__ == "__main__":
    main()

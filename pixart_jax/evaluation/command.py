"""``python -m pixart_jax evaluate shapes | vae | checker``: a model, its autoencoder, and the judge
itself, by one score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from pixart_jax import cli
from pixart_jax.data import shapes
from pixart_jax.errors import UserError, nearest
from pixart_jax.evaluation import report
from pixart_jax.evaluation.shapes_score import Score, score
from pixart_jax.evaluation.tasks import EvalPrompt, eval_prompts
from pixart_jax.files import bundled
from pixart_jax.images import to_model, to_uint8

SHIPPED = bundled("assets") / "shapes"
Level = Literal[*shapes.LEVELS]
_PROG = "python -m pixart_jax evaluate"


@dataclasses.dataclass(frozen=True)
class ShapesOptions:
    """Draw scenes of the embedded world with a model and score them: object, colour, shape,
    counting, position, binding."""

    model: Path = SHIPPED
    """a model folder, as sample.py takes it"""
    level: Level = "plain"
    """difficulty of the scenes"""
    per_task: int = 100
    """pictures a set: single, count, pair, (three,) and two sets of withheld pairs"""
    captions: Literal["short", "dense"] = "short"
    """what the model is told"""
    steps: int | None = None
    """of the solver; by default the model's own, 20"""
    guidance: float | None = None
    """classifier-free guidance scale; by default the model's own"""
    solver: str | None = None
    """dpm++, ddim, ddpm, sa, lcm or dmd; by default the model's own"""
    seed: int = 0
    """of the noise; the scenes are always the same"""
    guidance_interval: tuple[float, float] | None = None
    """guide only between these two times (0 … 999); this and the next three as sample.py's, what
    they cost in quality"""
    cross_attention_steps: int | None = None
    """after so many steps keep what cross-attention last gave and end guidance"""
    blocks_every: int = 1
    """compute the blocks at every N-th step alone"""
    block_schedule: str | None = None
    """a JSON file: for each step, block and part 1 or 0"""
    batch_size: int = 32
    """pictures drawn at once"""
    out: Path | None = None
    """folder for score.json and sheet.png, where right and wrong are marked"""


@dataclasses.dataclass(frozen=True)
class VAEOptions:
    """Score the true scenes after a way through a model's autoencoder: no model that draws with it
    scores more."""

    model: Path = SHIPPED
    """a model folder, or the folder of its VAE alone"""
    level: Level = "plain"
    """difficulty of the scenes"""
    per_task: int = 100
    """pictures a set"""
    batch_size: int = 32
    """pictures encoded at once"""
    out: Path | None = None
    """folder for score.json and sheet.png"""


@dataclasses.dataclass(frozen=True)
class CheckerOptions:
    """Score true renders: what the checker itself gets wrong."""

    level: Literal["all", *shapes.LEVELS] = "all"
    """one difficulty, or all of them"""
    per_task: int = 100
    """pictures a set"""
    out: Path | None = None
    """folder for score.json and sheet.png (in a folder a level where there are several)"""


def main(argv: Sequence[str]) -> int:
    """Run one of the three; argv as after ``evaluate``. Returns the exit status; UserError for what
    cannot be used."""
    commands: dict[str, tuple[type, Callable]] = {
        "shapes": (ShapesOptions, evaluate_shapes),
        "vae": (VAEOptions, evaluate_vae),
        "checker": (CheckerOptions, evaluate_checker),
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {_PROG} WHAT [flags]\n")
        for name, (options, _) in commands.items():
            print(f"  {name:8} {options.__doc__}")
        print(f"\n{_PROG} WHAT --help lists the flags.")
        return 0 if argv else 2
    what, *rest = argv
    if what not in commands:
        raise UserError(f"evaluate {what!r} is unknown{nearest(what, commands)}")
    options, run = commands[what]
    run(cli.parse(options, rest, prog=f"{_PROG} {what}", description=options.__doc__))
    return 0


def evaluate_shapes(options: ShapesOptions, pipeline=None) -> Score:
    """Draw, judge, print; ``pipeline`` instead of the one at ``options.model``."""
    from pixart_jax.pipeline import CacheConfig, Pipeline

    shortcuts = CacheConfig(
        options.guidance_interval,
        options.cross_attention_steps,
        options.blocks_every,
        options.block_schedule,
    )
    wanted = eval_prompts(options.level, options.per_task, options.captions)
    if options.batch_size < 1:
        raise UserError(f"batch-size {options.batch_size}: at least 1")
    _writable(options.out)
    pipeline = pipeline or Pipeline.from_pretrained(options.model)
    steps, guidance, solver = pipeline.sampling.with_defaults(
        options.steps, options.guidance, options.solver
    )
    options = dataclasses.replace(options, steps=steps, guidance=guidance, solver=solver)

    def draw(rows: list[int], height: int, width: int) -> Iterable[tuple[list[int], np.ndarray]]:
        return pipeline.generate(
            [wanted[i].caption for i in rows],
            steps=options.steps,
            guidance=options.guidance,
            solver=options.solver,
            height=height,
            width=width,
            seed=options.seed,
            shortcuts=shortcuts,
            indices=rows,  # a picture's noise belongs to its scene, whatever else is drawn
            batch_size=min(options.batch_size, len(rows)),
        )

    images = _by_canvas(wanted, draw, "drawing")
    how = (
        f"{options.captions} captions · {options.solver} {options.steps} steps, guidance "
        f"{options.guidance:g}, seed {options.seed}"
    )
    how += "".join(
        f", {name.replace('_', ' ')} {value}" for name, value in shortcuts.settings().items()
    )
    return _tell(options, wanted, images, f"shapes · level {options.level} · {how}")


def evaluate_vae(options: VAEOptions, vae=None) -> Score:
    """Encode to the posterior's mean and decode; ``vae`` instead of the one at
    ``options.model``."""
    wanted = eval_prompts(options.level, options.per_task)
    if options.batch_size < 1:
        raise UserError(f"batch-size {options.batch_size}: at least 1")
    _writable(options.out)
    if vae is None:
        from pixart_jax.weights.component import load_component

        folder = Path(options.model)
        vae = load_component(folder / "vae" if (folder / "vae").is_dir() else folder)
        if not hasattr(vae, "decode"):
            raise UserError(f"{folder} is no autoencoder: give a model folder or its vae/")
    renders = [shapes.render(a.scene) for a in wanted]

    def through(rows: list[int], height: int, width: int) -> Iterable[tuple[list[int], np.ndarray]]:
        size = min(options.batch_size, len(rows))
        for start in range(0, len(rows), size):
            some = list(range(start, min(start + size, len(rows))))
            # one shape, so that nothing compiles twice
            full = some + [some[-1]] * (size - len(some))
            pixels = to_model(np.stack([renders[rows[i]] for i in full]))
            mean, _ = vae.encode(pixels)
            back = np.asarray(vae.decode(mean), np.float32)[: len(some)]
            yield some, to_uint8(back)

    images = _by_canvas(wanted, through, "reconstructing")
    errors = np.array([np.mean((a.astype(np.float32) - b) ** 2) for a, b in zip(images, renders)])
    psnr = float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-3))))
    title = f"autoencoder's reconstructions · level {options.level} · the cap of any model's score"
    result = _tell(options, wanted, images, title, psnr=psnr)
    print(f"PSNR {psnr:.2f} dB (mean of pictures)")
    return result


def evaluate_checker(options: CheckerOptions) -> dict[str, Score]:
    """Level → the score of its true renders."""
    levels = list(shapes.LEVELS) if options.level == "all" else [options.level]
    _writable(options.out)
    results = {}
    for level in levels:
        wanted = eval_prompts(level, options.per_task)
        images = [
            shapes.render(a.scene)
            for a in tqdm(wanted, desc=f"{level}: rendering", unit="image", leave=False)
        ]
        out = options.out if options.out is None or len(levels) == 1 else options.out / level
        results[level] = _tell(
            dataclasses.replace(options, level=level, out=out),
            wanted,
            images,
            f"true renders · level {level}",
        )
        print()
    return results


# ---- what the three share
# ------------------------------------------------------------------------------------------


def _by_canvas(wanted: Sequence[EvalPrompt], draw: Callable, what: str) -> list[np.ndarray]:
    """Images in the order of ``wanted``. draw(rows, height, width) yields (positions in rows, uint8
    [b, height, width, 3])."""
    images: dict[int, np.ndarray] = {}
    canvases: dict[tuple[int, int], list[int]] = {}
    for i, a in enumerate(wanted):
        canvases.setdefault((a.scene.height, a.scene.width), []).append(i)
    with tqdm(total=len(wanted), desc=what, unit="image") as bar:
        for (height, width), rows in canvases.items():
            for positions, batch in draw(rows, height, width):
                images.update(zip([rows[p] for p in positions], batch))
                bar.update(len(positions))
    return [images[i] for i in range(len(wanted))]


def _writable(out: Path | None) -> None:
    """An output folder that cannot be is named before the work, not after it."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)


def _tell(
    options, wanted: Sequence[EvalPrompt], images: Sequence[np.ndarray], title: str, **more
) -> Score:
    """Score, print the table, write the files."""
    result = score(wanted, images)
    print(report.table(result, f"{title} · {options.per_task} pictures a set"))
    if options.out is not None:
        settings = {
            k: str(v) if isinstance(v, Path) else v
            for k, v in dataclasses.asdict(options).items()
            if k != "out"
        }
        paths = report.write(options.out, result, images, {**settings, **more})
        print(f"\nwritten: {', '.join(map(str, paths))}")
    return result

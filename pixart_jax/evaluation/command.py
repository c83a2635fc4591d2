"""``python -m pixart_jax evaluate``: shapes, vae and checker score a model of the embedded world,
its autoencoder and the checker itself; the others, generated images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro
from tqdm import tqdm

from pixart_jax import cli
from pixart_jax.data import shapes
from pixart_jax.errors import UserError, nearest
from pixart_jax.evaluation import report, shapes_score, study, study_report
from pixart_jax.evaluation.compbench import CompbenchOptions, evaluate_compbench
from pixart_jax.evaluation.dpg import DpgOptions, evaluate_dpg
from pixart_jax.evaluation.fid_command import FidOptions, evaluate_fid
from pixart_jax.evaluation.generated import GeneratedOptions, split_sampling
from pixart_jax.evaluation.geneval import GenevalOptions, evaluate_geneval
from pixart_jax.evaluation.score_command import (
    ClipOptions,
    PreferenceOptions,
    evaluate_clip,
    evaluate_preference,
)
from pixart_jax.evaluation.shapes_score import Score
from pixart_jax.evaluation.tasks import Batches, by_size, eval_prompts
from pixart_jax.files import bundled
from pixart_jax.finite import check_images
from pixart_jax.images import to_model, to_uint8, write_png
from pixart_jax.pipeline import lora_flags
from pixart_jax.pipeline.lora_flags import LoraFlags
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.remote_path import Location

Commands = Mapping[str, tuple[type, Callable]]  # name → (options, what runs them)
SHIPPED = bundled("assets") / "shapes"
if TYPE_CHECKING:
    Level = str
    AnyLevel = str
else:  # the choices that --help lists
    Level, AnyLevel = Literal[*shapes.COLOURED], Literal["all", *shapes.COLOURED]


@dataclasses.dataclass(frozen=True)
class _Options:
    level: Level = "plain"
    """difficulty of the scenes"""
    per_task: int = 100
    """images a set: single, count, pair, (three,) and two sets of withheld pairs"""
    out: Path | None = None
    """folder for score.json and sheet.png, where right and wrong are marked"""


@dataclasses.dataclass(frozen=True)
class _ModelOptions(_Options):
    model: Location = SHIPPED
    """a model folder, as sample.py takes it; of vae also the folder of its VAE"""
    variant: str | None = None
    """of the model's weight files, such as fp16; by default the ones without, or the only ones"""
    batch_size: int = 32
    """images a batch"""


@dataclasses.dataclass(frozen=True)
class ShapesOptions(_ModelOptions):
    """Generate scenes of the embedded world with a model and score them: object, colour, shape,
    counting, position, binding."""

    captions: Literal["short", "dense"] = "short"
    """kind of prompts"""
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    loras: tyro.conf.OmitArgPrefixes[LoraFlags] = LoraFlags()
    seed: int = 0
    """of the noise; the scenes are always the same"""


class VAEOptions(_ModelOptions):
    """Score the true scenes after a pass through a model's autoencoder: about the most that a model
    that decodes with it can score."""


@dataclasses.dataclass(frozen=True)
class CheckerOptions(_Options):
    """Score true renders: what the checker itself gets wrong."""

    level: AnyLevel = "all"
    """one difficulty, or all of them, each in its own folder of --out"""


def main(argv: Sequence[str]) -> int:
    """Run one of them; argv as after ``evaluate``. Returns the exit status."""
    if argv[:1] == ["study"]:
        what = argv[1:]
        if what and what[0].startswith("-") and what[0] not in ("-h", "--help"):
            what = ["report", *what]
        commands: Commands = {
            "build": (study.BuildOptions, study.build),
            "report": (study_report.ReportOptions, study_report.report_votes),
        }
        others = {"serve": "Show a study to raters over the network."}  # serving/study.py
        return _run("evaluate study", what, commands, others)
    commands = {
        "shapes": (ShapesOptions, evaluate_shapes),
        "vae": (VAEOptions, evaluate_vae),
        "checker": (CheckerOptions, evaluate_checker),
        "fid": (FidOptions, evaluate_fid),
        "clip": (ClipOptions, evaluate_clip),
        "preference": (PreferenceOptions, evaluate_preference),
        "compbench": (CompbenchOptions, evaluate_compbench),
        "geneval": (GenevalOptions, evaluate_geneval),
        "dpg": (DpgOptions, evaluate_dpg),
    }
    others = {"study": "Let people compare images: build, serve and report a blind study."}
    return _run("evaluate", argv, commands, others)


def _run(name: str, argv: Sequence[str], commands: Commands, others: Mapping[str, str]) -> int:
    """others: commands that --help lists too, with what they do."""
    prog = f"python -m pixart_jax {name}"
    if not argv or argv[0] in ("-h", "--help"):
        whats = {what: str(options.__doc__) for what, (options, _) in commands.items()}
        print(cli.usage(prog, {**whats, **others}))
        return 0 if argv else 2
    what, *rest = argv
    if what not in commands:
        raise UserError(f"{name} {what!r} is unknown{nearest(what, [*commands, *others])}")
    options, run = commands[what]
    if issubclass(options, GeneratedOptions):
        rest, flags = split_sampling(rest)
        run = functools.partial(run, flags=flags)
    run(cli.parse(options, rest, prog=f"{prog} {what}", description=options.__doc__))
    return 0


def evaluate_shapes(options: ShapesOptions, pipeline=None) -> Score:
    """Generate, judge, print; ``pipeline`` instead of the one at ``options.model``."""
    from pixart_jax.pipeline import Pipeline

    prompts = eval_prompts(options.level, options.per_task, options.captions)
    _check(options)
    pipeline = pipeline or Pipeline.from_pretrained(options.model, variant=options.variant)
    adapters = []
    if options.loras.lora:
        adapters = options.loras.read(pipeline.transformer.config)
        lora_flags.load(pipeline, adapters)
    sampling = options.sampling.with_defaults(pipeline.sampling)
    options = dataclasses.replace(options, sampling=sampling)

    def generate(rows: list[int], height: int, width: int) -> Batches:
        captions, size = [prompts[i].caption for i in rows], min(options.batch_size, len(rows))
        how = {"height": height, "width": width, "seed": options.seed, "batch_size": size}
        # an image's noise depends on its scene only
        return pipeline.generate(captions, sampling, indices=rows, **how)

    images = by_size(prompts, generate, "generating")
    shown = sampling.settings()
    if adapters:
        shown["lora"] = " + ".join(f"{adapter.name}:{weight:g}" for adapter, weight in adapters)
    main = {name: shown.pop(name) for name in ("solver", "steps", "guidance", "times", "null")}
    title = f"shapes · level {options.level} · {options.captions} captions · "
    title += "{solver} {steps} steps, guidance {guidance:g}".format(**main)
    title += f", seed {options.seed}"
    for name, value in shown.items():
        title += f", {name.replace('_', ' ')} {value}"
    return _report(options, prompts, images, title, **lora_flags.settings(adapters))


def evaluate_vae(options: VAEOptions, vae=None) -> Score:
    """Encode to the posterior's mean and decode; ``vae`` instead of the one at
    ``options.model``."""
    prompts = eval_prompts(options.level, options.per_task)
    _check(options)
    if vae is None:
        from pixart_jax.weights.component import load_component
        from pixart_jax.weights.hub import model_folder

        folder = model_folder(options.model, ("vae",), variant=options.variant)
        part = folder / "vae" if (folder / "vae").is_dir() else folder
        vae = load_component(part, variant=options.variant)
        if not hasattr(vae, "decode"):
            raise UserError(f"{folder} is no autoencoder: give a model folder or its vae/")
    renders = [shapes.render(prompt.scene) for prompt in prompts]

    def reconstruct(rows: list[int], height: int, width: int) -> Batches:
        size = min(options.batch_size, len(rows))
        for start in range(0, len(rows), size):
            some = list(range(start, min(start + size, len(rows))))
            # the last batch is filled up, so that nothing compiles twice
            full = some + [some[-1]] * (size - len(some))
            mean, _ = vae.encode(to_model(np.stack([renders[rows[i]] for i in full])))
            decoded = np.asarray(vae.decode(mean), np.float32)[: len(some)]
            yield some, to_uint8(check_images(decoded))

    images = by_size(prompts, reconstruct, "reconstructing")
    errors = np.array([np.mean((a.astype(np.float32) - b) ** 2) for a, b in zip(images, renders)])
    psnr = float(np.mean(10 * np.log10(255**2 / np.maximum(errors, 1e-3))))
    title = f"autoencoder's reconstructions · level {options.level} · about the most of a model"
    result = _report(options, prompts, images, title, psnr=psnr)
    print(f"PSNR {psnr:.2f} dB (mean over images)")
    return result


def evaluate_checker(options: CheckerOptions) -> dict[str, Score]:
    """Level → the score of its true renders."""
    levels = list(shapes.COLOURED) if options.level == "all" else [options.level]
    _check(options)
    results = {}
    for level in levels:
        prompts = eval_prompts(level, options.per_task)
        bar = tqdm(prompts, desc=f"{level}: rendering", unit="image", leave=False)
        images = [shapes.render(prompt.scene) for prompt in bar]
        out = options.out / level if options.out and len(levels) > 1 else options.out
        at = dataclasses.replace(options, level=level, out=out)
        results[level] = _report(at, prompts, images, f"true renders · level {level}")
        print()
    return results


# ---- what the three share ----


def _check(options) -> None:
    """UserError for a bad batch size; an output folder that cannot be created is reported before
    the work."""
    if getattr(options, "batch_size", 1) < 1:
        raise UserError(f"batch-size {options.batch_size}: at least 1")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)


def _report(options, prompts, images: Sequence[np.ndarray], title: str, **more) -> Score:
    """Score, print the table, write the files with the options and ``more``."""
    result = shapes_score.score(prompts, images)
    print(shapes_score.table(result, f"{title} · {options.per_task} images a set"))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        facts = dataclasses.asdict(options)
        del facts["out"]
        facts.pop("loras", None)
        facts |= facts.pop("sampling", {})
        facts = {k: str(v) if isinstance(v, PurePath) else v for k, v in facts.items()}
        listed = "\n".join(prompt.caption for prompt in prompts)
        facts |= {**more, "prompts": sha256(listed.encode()).hexdigest(), **result.to_dict()}
        main = result.mean or result.all_correct
        assert main is not None  # a level has sets that are not withheld
        figures = main.rounded()
        head = {"value": figures["score"], "interval": [figures["low"], figures["high"]]}
        sheet, n = options.out / "sheet.png", {"generated": len(images)}
        write_png(sheet, shapes_score.sheet(result, images))
        report.finish(options.out, "shapes", head, n, facts, written=[sheet])
    return result

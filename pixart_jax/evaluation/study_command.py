"""``python -m pixart_jax evaluate study build | report``: people compare the images of models."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from pixart_jax import cli, plots
from pixart_jax.errors import UserError, nearest
from pixart_jax.evaluation import report, study, study_report

_PROG = "python -m pixart_jax evaluate study"


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Write a blind study of two or more folders of images: OUT/page, a static site for raters
    without the names of models, and OUT/key.json, for you alone."""

    folders: tyro.conf.Positional[tuple[str, ...]] = ()
    """NAME=FOLDER or FOLDER, two or more, with images of the same names"""
    out: Path = Path("study")
    """a new folder"""
    prompts: Path | None = None
    """a file with the prompt of each image in the order of names; by default as PNGs of sample.py
    and names of T2I-CompBench's form (PROMPT_000000.png) say"""
    size: int | None = None
    """cut all images to their centre square and resize it to so many px (LANCZOS)"""
    questions: tuple[study.Question, ...] = ("quality", "alignment")
    """passes of a rater, in this order; alignment shows the prompt"""
    per_rater: int = 50
    """pairs of images that a rater judges, once for each question"""
    judgements: int = 3
    """sheets on which each pair is, so the least number of raters of each"""
    seed: int = 0
    """of the sheets; the same seed and images give the same study"""

    def __post_init__(self):
        if len(self.folders) < 2:
            raise UserError("give two or more folders of images: NAME=FOLDER NAME=FOLDER")
        if min(self.per_rater, self.judgements, self.size or 1) < 1 or self.seed < 0:
            raise UserError("per-rater, judgements and size: at least 1; seed: at least 0")
        if not self.questions or len(set(self.questions)) < len(self.questions):
            raise UserError("questions: each of quality and alignment at most once, at least one")


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Win rates, Bradley–Terry strengths, agreement and biases of a study's votes."""

    votes: Path
    """JSON lines: as `study serve` writes them, or, with --study, as raters' pages save them"""
    out: Path | None = None
    """folder for score.json and win_rates.png"""
    study: Path | None = None
    """the study's folder, whose key.json tells the models of a page's images"""
    prior: float = 0.0
    """wins added to each side of each pair, such as 0.5; needed where a model wins every vote"""
    seed: int = 0
    """of the bootstrap"""

    def __post_init__(self):
        if not 0 <= self.prior < float("inf") or self.seed < 0:
            raise UserError("prior and seed: at least 0")


def build(options: BuildOptions) -> None:
    named = [re.fullmatch(r"([^/=]+)=(.+)", folder) for folder in options.folders]
    folders = {
        (match[1] if match else Path(folder).resolve().name): Path(match[2] if match else folder)
        for match, folder in zip(named, options.folders)
    }
    if len(folders) < len(options.folders):
        raise UserError("two folders have one name: give NAME=FOLDER")
    how = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)[2:]}
    counts = study.build(folders, options.out, **how)
    print("{models} models, {prompts} prompts, {pairs} pairs of images".format(**counts))
    print("{sheets} sheets, {trials} trials each: so many raters judge all".format(**counts))
    print(f"for raters:     {options.out / study.PAGE}")
    print(f"for you alone:  {options.out / study.KEY}")


def report_votes(options: ReportOptions) -> None:
    key = study.read_key(options.study) if options.study else None
    found = study_report.analyse(
        study.read_votes(options.votes, key), prior=options.prior, seed=options.seed
    )
    print(study_report.table(found))
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    panels: dict[str, dict[str, tuple[float, float, float]]] = {
        question: {f"{p['a']} over {p['b']}": (p["rate"], p["low"], p["high"]) for p in of["pairs"]}
        for question, of in found["questions"].items()
    }
    first: dict[str, Any] = next(iter(found["questions"].values()))["pairs"][0]
    head = {"value": first["rate"], "interval": [first["low"], first["high"]]}
    n = {name: found[name] for name in ("votes", "raters", "prompts")}
    path = options.out / "win_rates.png"
    title = f"win rates, ties as halves, 95% · {found['raters']} raters, {found['prompts']} prompts"
    chart = plots.intervals(path, panels, title=title, mark=0.5)
    report.finish(options.out, "study", head, n, found, written=[chart])


def main(argv: Sequence[str]) -> int:
    """Run one of them; argv as after ``study``. Flags alone are those of report. Returns the exit
    status."""
    commands: dict[str, tuple[type, Callable]] = {
        "build": (BuildOptions, build),
        "report": (ReportOptions, report_votes),
    }
    if not argv or argv[0] in ("-h", "--help"):
        whats = {name: str(options.__doc__) for name, (options, _) in commands.items()}
        print(cli.usage(_PROG, {**whats, "serve": "Show a study to raters over the network."}))
        return 0 if argv else 2
    what, *rest = argv if not argv[0].startswith("-") else ("report", *argv)
    if what not in commands:
        raise UserError(f"evaluate study {what!r} is unknown{nearest(what, commands)}")
    options, run = commands[what]
    run(cli.parse(options, rest, prog=f"{_PROG} {what}", description=options.__doc__))
    return 0

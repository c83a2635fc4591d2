"""python -m pixart_jax plan RECIPE --topology NAME: memory, time and cost of a run before a chip is
paid for.

The very step that train.py runs is compiled for hardware that is not here, from shapes alone: no
data, no weights and no device are needed, only the platform's compiler.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pixart_jax import cli
from pixart_jax.config import Config, MeshConfig
from pixart_jax.errors import UserError, nearest

USAGE = (
    "python -m pixart_jax plan configs/NAME.py --topology v5e:16x16 [flags] [--FIELD VALUE …, "
    "as train.py takes them]"
)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """topology: v4, v5e, v5p, v6e or tpu7x and its chips (v5e:16x16), h100 or h200 and GPUs x hosts
    (h200:8x4), or cpu:N."""

    topology: str
    slices: int = 1  # TPU slices of that topology, joined by the data center's network
    mesh: str | None = None  # axes and sizes, as fsdp=16,tensor=2; the config's where not given
    # of every stage that is planned, or of a batch of images with --sample
    batch_size: int | None = None
    stage: str | None = None  # one stage by name; all of them where not given
    sweep: bool = False  # rank meshes and batch sizes by predicted images/s
    most: int = 8  # programs that --sweep compiles
    sample: bool = False  # plan drawing with the last stage's model, not training
    height: int | None = None  # pixels of --sample; the model's own side where not given
    width: int | None = None
    steps: int = 20  # of --sample
    guidance: float = 4.5  # of --sample; 1 does no second pass
    solver: str = "dpm++"  # of --sample
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of --sample
    json: Path | None = None  # also write every figure here
    compile_gib: float = 4.0  # bound of this machine's memory for one compilation
    compile_seconds: float = 600.0  # and of its time


def split(argv: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """(the recipe, this command's own flags, overrides of the config)."""
    switches = {"sweep", "sample"}
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(PlanOptions)}
    own, rest, todo = [], [], list(argv)
    recipe = todo.pop(0) if todo and not todo[0].startswith("-") else None
    while todo:
        token = todo.pop(0)
        name, given, _ = token.partition("=")
        name = name.removeprefix("--").replace("_", "-")
        if not token.startswith("--") or name.removeprefix("no-") not in flags:
            rest.append(token)
            continue
        own.append(token)
        if name.removeprefix("no-") not in switches and not given and todo:
            own.append(todo.pop(0))
    return recipe, own, rest


def main(argv: list[str]) -> int:
    # this process only reads and counts: no device is looked for, whatever is installed
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
    from pixart_jax.training import recipes

    recipe, own, overrides = split(argv)
    if recipe is None and not {"-h", "--help"} & set(argv):
        raise UserError(f"the recipe comes first: {USAGE}; there are {', '.join(recipes.known())}")
    if recipe is None:
        own, overrides = ["--help"], []
    if {"-h", "--help"} & set(overrides) and recipe is not None:
        print(f"usage: {USAGE}\n")
        own = ["--help"]
    options = cli.parse(PlanOptions, own, prog="pixart_jax plan", description=f"usage: {USAGE}")

    if options.most < 1:
        raise UserError(f"--most {options.most}: at least 1")

    from pixart_jax.planning import compilation
    from pixart_jax.planning import topology as topologies

    bounds = compilation.CompileLimits(options.compile_gib, options.compile_seconds)
    topology = topologies.parse(options.topology, options.slices)
    config = configured(recipes.parse_config(recipes.find(recipe), overrides), options)
    chosen = stages(config, options)

    jobs = [job(config, index, topology, options) for index in chosen]
    from pixart_jax.planning import plan as plans

    if not options.sweep:
        for one in jobs:
            plans.check(one)
    topologies.require_compiler(topology)
    found = swept(jobs, options, bounds) if options.sweep else planned(jobs, options, bounds)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def configured(config: Config, options: PlanOptions) -> Config:
    """The config with the mesh and the batch size that the flags name."""
    if options.mesh is not None:
        config = dataclasses.replace(config, mesh=MeshConfig.parse(options.mesh))
    if options.batch_size is not None and not options.sample:
        one = None if options.stage is None else options.stage
        changed = [
            dataclasses.replace(stage, batch_size=options.batch_size)
            if one in (None, stage.name)
            else stage
            for stage in config.stages
        ]
        config = dataclasses.replace(config, stages=tuple(changed))
    return config


def stages(config: Config, options: PlanOptions) -> list[int]:
    """Numbers of the stages to plan."""
    names = [stage.name for stage in config.stages]
    if options.stage is not None:
        if options.stage not in names:
            raise UserError(
                f"config {config.name} has no stage "
                f"{options.stage!r}{nearest(options.stage, names)}; it has {', '.join(names)}"
            )
        return [names.index(options.stage)]
    return [len(names) - 1] if options.sample else list(range(len(names)))


def job(config: Config, index: int, topology, options: PlanOptions):
    """The program of a stage, or the sampler's scan."""
    from pixart_jax.planning import jobs
    from pixart_jax.planning import plan as plans

    stage = config.stages[index]
    mesh = (
        jobs.resolve_mesh(config.mesh, topology.size)
        if not options.sweep
        else (topology.size, 1, 1, 1)
    )
    if not options.sample:
        return jobs.PlanTarget(topology, config, index, mesh, bucket=plans.largest(stage))
    if stage.task != "text_to_image":
        raise UserError(
            f"stage {stage.name}: --sample draws with a text-to-image model, and this stage's "
            f"task is {stage.task}"
        )
    return jobs.PlanTarget(
        topology,
        config,
        index,
        mesh,
        drawing=drawing(config, options, mesh[0] * mesh[1]),
        part="denoise",
    )


def drawing(config: Config, options: PlanOptions, shards: int):
    """What --sample draws; by default one image a batch shard."""
    from pixart_jax.models.vae import VAEConfig
    from pixart_jax.pipeline.image_size import check_options
    from pixart_jax.pipeline.sampling_config import SamplingConfig
    from pixart_jax.pipeline.scheduler import SchedulerConfig
    from pixart_jax.planning import jobs

    how = {"steps": options.steps, "guidance": options.guidance, "solver": options.solver}
    (height, width), _ = check_options(
        SamplingConfig(**how, binning=False).with_defaults(),
        config.model,
        VAEConfig(),
        SchedulerConfig(),
        height=options.height,
        width=options.width,
        batch_size=options.batch_size,
    )
    return jobs.SamplingWorkload(
        options.batch_size or shards, height, width, **how, dtype=options.dtype
    )


def planned(jobs, options: PlanOptions, bounds) -> dict:
    """Each job compiled and told."""
    from pixart_jax.planning import drawings, report
    from pixart_jax.planning import plan as plans

    made = []
    for one in jobs:
        if one.drawing is not None:
            whole = drawings.make(one, bounds)
            print(drawings.text(whole))
            return {
                "programs": [report.as_json(p) for p in whole.parts],
                "batch": drawings.as_json(whole),
            }
        if made:
            print()
        made.append(plans.make(one, bounds))
        print(report.text(made[-1]), flush=True)
    if len(made) > 1:
        print(f"\n{report.total(made)}")
    print(f"\n{report.LEGEND}")
    return {"programs": [report.as_json(p) for p in made]}


def swept(jobs, options: PlanOptions, bounds) -> dict:
    """The ranking of each job's candidates."""
    from pixart_jax.planning import report, sweep

    found = []
    for one in jobs:
        outcomes = sweep.run(one, options.most, bounds, sizes=options.batch_size is None)
        print(ranking(one, outcomes), flush=True)
        found.append(
            {
                "stage": one.stage_config.name,
                "ranking": [
                    report.as_json(o.plan) if o.plan else {"mesh": o.job.axes, "fault": o.fault}
                    for o in outcomes
                ],
            }
        )
    print(f"\n{report.LEGEND}")
    return {"sweeps": found}


def ranking(one, outcomes) -> str:
    """The table of a sweep."""
    from pixart_jax.planning import report

    rows = []
    for outcome in outcomes:
        p = outcome.plan
        mesh = (
            " ".join(f"{name}={size}" for name, size in outcome.job.axes.items() if size > 1)
            or "one device"
        )
        if p is None:
            rows.append((mesh, "", "", "", "", "", outcome.fault[:80]))
            continue
        timed = p.time is not None
        rows.append(
            (
                mesh,
                f"{p.batch:,}",
                report.data(p.facts.total),
                report.clock(p.seconds) if timed else "",
                f"{p.images_per_second:,.1f}" if timed else "",
                f"{p.mfu:.1%}" if p.mfu is not None else "",
                "fits" if p.fits else "no limit known" if p.fits is None else report.verdict(p),
            )
        )
    title = f"{one.topology.label}, {one.topology.size} devices: " + (
        f"stage {one.stage_config.name}, remat {one.config.remat}"
        if one.drawing is None
        else "sampling, denoise"
    )
    header = ("mesh", "batch", "memory a device", "step", "images/s", "MFU", "")
    return (
        f"{title}\n{report.table(header, rows)}\n(batch: counted; memory: compiled; step, "
        "images/s, MFU: estimate)"
    )

"""python -m pixart_jax plan RECIPE --topology NAME: memory, time and cost of a run before the
hardware is paid for.

The step that train.py runs is compiled for the target hardware from shapes alone: no data, no
weights and no device are needed, only the platform's compiler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import tyro

from pixart_jax import cli
from pixart_jax.config import Config
from pixart_jax.errors import UserError, nearest
from pixart_jax.files import write_json
from pixart_jax.models.configs import VAEConfig
from pixart_jax.parallel.mesh import resolve_sizes
from pixart_jax.pipeline.image_size import check_options
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.planning import plan, report, sweep, topology
from pixart_jax.planning.compilation import CompileLimits
from pixart_jax.planning.target import PlanTarget, SamplingWorkload
from pixart_jax.training import recipes

USAGE = (
    "python -m pixart_jax plan configs/NAME.py --topology v5e:16x16 [flags] "
    "[--mesh fsdp=16,data=16 --FIELD VALUE …, as train.py takes them]"
)


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """topology: v4, v5e, v5p, v6e or tpu7x and its chips (v5e:16x16), h100 or h200 and GPUs x hosts
    (h200:8x4), or cpu:N."""

    topology: str
    slices: int = 1  # TPU slices of that topology, joined by the data center's network
    # of every stage that is planned, or of a batch of images with --sample
    batch_size: int | None = None
    stage: str | None = None  # one stage by name; all of them where not given
    sweep: bool = False  # rank meshes and batch sizes by predicted images/s
    most: int = 8  # programs that --sweep compiles
    sample: bool = False  # plan sampling with the last stage's model, not training
    height: int | None = None  # pixels of --sample; the model's own side where not given
    width: int | None = None
    sampling: tyro.conf.OmitArgPrefixes[SamplingConfig] = SamplingConfig()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of --sample
    json: Path | None = None  # also write every figure here
    compile_gib: float = 4.0  # limit of this machine's memory for one compilation
    compile_seconds: float = 600.0  # and of its time


def main(argv: list[str]) -> int:
    jax.config.update("jax_platforms", "cpu")  # this process only counts: it needs no device
    recipe = argv[0] if argv and not argv[0].startswith("-") else None
    if recipe is None and not {"-h", "--help"} & set(argv):
        raise UserError(f"the recipe comes first: {USAGE}; there are {', '.join(recipes.known())}")
    flags = argv[recipe is not None :]
    options, overrides = cli.parse_known(
        PlanOptions, flags, prog="pixart_jax plan", description=f"usage: {USAGE}"
    )
    if options.most < 1:
        raise UserError(f"--most {options.most}: at least 1")
    limits = CompileLimits(options.compile_gib, options.compile_seconds)
    where = topology.parse(options.topology, options.slices)
    config = recipes.parse_config(recipes.find(recipe or ""), overrides)
    targets = [make_target(config, index, where, options) for index in stages(config, options)]
    if not options.sweep:
        for target in targets:
            plan.check(target)
    topology.require_compiler(where)
    run = run_sweep if options.sweep else run_sampling if options.sample else run_stages
    found = run(targets, options, limits)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, found, indent=1)
    return 0


def stages(config: Config, options: PlanOptions) -> list[int]:
    """Indices of the stages to plan."""
    names = [stage.name for stage in config.stages]
    if options.stage is None:
        return [len(names) - 1] if options.sample else list(range(len(names)))
    if options.stage not in names:
        close = nearest(options.stage, names)
        raise UserError(
            f"config {config.name} has no stage {options.stage!r}{close}; it has {', '.join(names)}"
        )
    return [names.index(options.stage)]


def make_target(
    config: Config, index: int, where: topology.Topology, options: PlanOptions
) -> PlanTarget:
    """The train step of a stage, or with --sample the sampler's scan."""
    stage = config.stages[index]
    config = config.of(stage)
    mesh = (where.size, 1, 1, 1) if options.sweep else resolve_sizes(config.mesh, where.size)
    if not options.sample:
        made = PlanTarget(where, config, index, mesh, plan.largest(stage))
        return made.with_mesh_and_batch(mesh, options.batch_size or stage.batch_size)
    if stage.task != "text_to_image":
        raise UserError(
            f"stage {stage.name}: --sample needs a text-to-image model, not {stage.task}"
        )
    o, batch = options, options.batch_size or mesh[0] * mesh[1]
    sampling = dataclasses.replace(o.sampling, binning=False).with_defaults()
    parts = (config.model, VAEConfig(), SchedulerConfig())
    size, _ = check_options(sampling, *parts, o.height, o.width, batch_size=o.batch_size)
    work = SamplingWorkload(batch, *size, sampling, o.dtype)
    return PlanTarget(where, config, index, mesh, sampling=work, part="denoise")


def run_stages(targets: Sequence[PlanTarget], options: PlanOptions, limits: CompileLimits) -> dict:
    """Compile and print each stage."""
    made = []
    for target in targets:
        made.append(plan.make(target, limits))
        print(f"{report.text(made[-1])}\n", flush=True)
    if len(made) > 1:
        print(f"{report.total(made)}\n")
    print(report.LEGEND)
    return {"programs": [report.as_json(p) for p in made]}


def run_sampling(
    targets: Sequence[PlanTarget], options: PlanOptions, limits: CompileLimits
) -> dict:
    """Compile and print the sampler of the one target."""
    made = plan.make_sampling(targets[0], limits)
    print(f"{report.sampling_text(made)}\n\n{report.LEGEND}")
    return report.sampling_json(made)


def run_sweep(targets: Sequence[PlanTarget], options: PlanOptions, limits: CompileLimits) -> dict:
    """Compile, rank and print the candidates of each target."""
    found = []
    for target in targets:
        outcomes = sweep.run(target, options.most, limits, sizes=options.batch_size is None)
        print(report.ranking(target, outcomes), flush=True)
        ranked = [
            report.as_json(o.plan) if o.plan else {"mesh": o.target.axes, "error": o.error}
            for o in outcomes
        ]
        found.append({"stage": target.stage_config.name, "ranking": ranked})
    print(f"\n{report.LEGEND}")
    return {"sweeps": found}

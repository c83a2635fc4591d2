"""The planner's figures: XL/2's train steps compiled for hardware that is not at hand.

    PYTHONPATH=.venv/compilers python benchmarks/plans.py table    the table of docs/pods.md
    PYTHONPATH=.venv/compilers python benchmarks/plans.py distil   the table of docs/few_steps.md
    PYTHONPATH=.venv/compilers python benchmarks/plans.py remat    the table of docs/attention.md
    python benchmarks/plans.py device --batch-size 64              predicted and measured, on a GPU
                                                                   or TPU that is at hand

table, distil: every step on slices of TPUs and on H200s, written between the markers of the page.
remat: what each remat policy's step holds beside its state; *temporaries* by the compiler's
account, *counted* by training/memory.py, GiB a device. device: bytes of the first device
(memory_stats()'s peak_bytes_in_use) and seconds of one step. Compiled programs are kept under
$PIXART_JAX_CACHE/plans. `make test` installs the compilers; a row without its compiler says so.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed.table import flag_parser, table, tell, write_between  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.config import DISTILLATIONS, MeshConfig  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.parallel.chips import GIB, chip_of  # noqa: E402
from pixart_jax.parallel.mesh import make_mesh, resolve_sizes  # noqa: E402
from pixart_jax.planning import compilation, estimate, plan, programs, report, topology  # noqa: E402
from pixart_jax.planning.target import PlanTarget  # noqa: E402
from pixart_jax.training import memory, recipes  # noqa: E402

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"


def target_of(
    where: topology.Topology,
    recipe: str,
    mesh: MeshConfig,
    batch: int,
    *,
    accumulate: int = 1,
    bucket: tuple[int, int] | None = None,
    remat: str | None = None,
) -> PlanTarget:
    """The step of a recipe's stage on this hardware; by default in its largest bucket and with its
    own remat policy."""
    config = recipes.load(recipes.find(recipe))
    stage = config.stages[0]
    optimizer = dataclasses.replace(stage.optimizer, accumulate=accumulate)
    stage = dataclasses.replace(stage, batch_size=batch, optimizer=optimizer)
    changes = {"stages": (stage,), "mesh": mesh, "remat": remat or config.remat}
    config, sizes = dataclasses.replace(config, **changes), resolve_sizes(mesh, where.size)
    return PlanTarget(where, config, 0, sizes, bucket or plan.largest(stage))


def chosen(rows: tuple, only: str | None) -> list:
    found = [row for row in rows if only in (None, row[0])]
    if not found:
        names = dict.fromkeys(row[0] for row in rows)
        raise UserError(f"--only {only}: one of {', '.join(names)}")
    return found


# ---- table ----

# recipe: the nearest multiple of 512 to its batch, so that one batch divides on every row.
BATCHES = {"xl2_256_sam": 11_264, "xl2_512_aesthetic": 2_560, "xl2_1024_ms": 512}
# (topology, slices, mesh, micro-batches of each recipe)
ROWS = (
    ("v5e:16x16", 1, "data=16,fsdp=16", (1, 1, 1)),
    ("v5p:4x4x4", 1, "data=4,fsdp=16", (1, 1, 1)),
    ("v6e:4x4", 1, "fsdp=16,data=1", (4, 4, 8)),
    ("v5e:16x16", 2, "data=32,fsdp=16", (1, 1, 1)),
    ("h200:8", 1, "fsdp=8,data=1", (2, 2, 4)),
)
COLUMNS = (
    "size|hardware|mesh|batch (micro-batches)|remat|memory a device|model PFLOP a step|"
    "step, ms (compute / memory / exposed)|images/s|MFU|the stage"
).split("|")
NOTES = (
    "PixArt XL/2, bfloat16, AdamW and EMA, remat "
    "`auto`; the 1024 px recipe at the largest of its 40 buckets for memory and the mean over them "
    "for time. Memory is compiled, model FLOPs are counted from shapes. Times, images/s, MFU and "
    f"cost are estimates: {estimate.ASSUMPTIONS}. Cost: the recipe's steps at this batch, at the "
    "list prices of pixart_jax/parallel/chips.py."
)
# recipe, pixels of the one bucket, its batch on 256 chips (of docs/pods.md) and on a GPU
DISTILLED = (
    ("xl2_1024_lcm", 512, 2_560, 32),
    ("xl2_1024_lcm", 1024, 512, 32),
    ("xl2_512_tdm", 512, 2_560, 32),
    ("xl2_512_tdm", 1024, 512, 32),
)
DISTILLED_ON = (("h200:1", "data=1"), ("v5e:16x16", "data=16,fsdp=16"))
DISTILLED_NOTES = "One bucket a row; else as in [pods.md](pods.md)."


def step_targets(only: str | None) -> Iterator[PlanTarget]:
    """Of the table of docs/pods.md."""
    for number, (recipe, batch) in enumerate(BATCHES.items()):
        for name, slices, mesh, micro in chosen(ROWS, only):
            where, sizes = topology.parse(name, slices), MeshConfig.parse(mesh)
            yield target_of(where, recipe, sizes, batch, accumulate=micro[number])


def distilled_targets(only: str | None) -> Iterator[PlanTarget]:
    """Of the table of docs/few_steps.md."""
    for name, mesh in chosen(DISTILLED_ON, only):
        for recipe, px, on_slice, on_gpu in DISTILLED:
            where, batch = topology.parse(name), on_gpu if name == "h200:1" else on_slice
            target = target_of(where, recipe, MeshConfig.parse(mesh), batch, bucket=(px, px))
            data = dataclasses.replace(target.stage_config.data, buckets=(target.bucket,))
            stage = dataclasses.replace(target.stage_config, data=data)
            config = dataclasses.replace(target.config, stages=(stage,))
            yield dataclasses.replace(target, config=config)


def plan_table(flags) -> None:
    distils = flags.what == "distil"
    limits = compilation.CompileLimits(*((8.0, 3600.0) if distils else ()))
    lines = []
    for target in (distilled_targets if distils else step_targets)(flags.only):
        plan.check(target)
        try:
            lines.append(plan_row(plan.make(target, limits)))
        except UserError as error:
            name = target.topology.name
            lines.append([target.stage_config.name, name, *["–"] * 8, str(error)])
        tell(" | ".join(lines[-1]))
    notes = DISTILLED_NOTES if distils else NOTES
    made = f"Made by `python benchmarks/plans.py {flags.what}`. {notes}"
    text = f"{made}\n\n{table(COLUMNS, lines)}"
    if flags.print or flags.only:
        print(text)
        return
    page = DOCS / ("few_steps.md" if distils else "pods.md")
    write_between(page, BEGIN, END, text)


def plan_row(made: plan.Plan) -> list[str]:
    t, target = made.time, made.target
    accumulate = target.stage_config.optimizer.accumulate
    task = target.stage_config.task
    first = [
        f"{f'{task}, ' if task in DISTILLATIONS else ''}{min(target.bucket)} px",
        target.topology.label,
        ", ".join(f"{name}={size}" for name, size in target.axes.items() if size > 1),
        f"{target.batch:,}{f' in {accumulate}' if accumulate > 1 else ''}",
        made.stats.remat,
        f"{report.data(made.stats.total)} of {report.data(made.usable)}",
    ]
    if t is None:
        return [*first, "–", "–", "–", "does not fit", "–"]
    parts = " / ".join(f"{1e3 * seconds:,.0f}" for seconds in (t.compute, t.memory, t.exposed))
    return [
        *first,
        f"{made.image_flops * target.batch / 1e15:,.1f}",
        f"{1e3 * t.step * made.mean:,.0f} ({parts})",
        f"{made.images_per_second:,.0f}",
        f"{made.mfu:.0%}",
        f"{made.cost.days:,.2f} d, {made.cost.usd:,.0f} USD",
    ]


# ---- remat ----

# (topology, recipe, mesh, batch, pixels)
REMAT_ROWS = (
    ("v5e:4x4", "xl2_256_sam", "fsdp=16,data=1", 256, 256),
    ("v5p:2x2x4", "xl2_1024_ms", "fsdp=16,data=1", 32, 1024),
    ("h200:1", "xl2_512_aesthetic", "fsdp=1,data=1", 32, 512),
)
POLICIES = ("full", "attention_out", "dots", "dots_attention", "offload", "none")
REMAT_COLUMNS = ("hardware", "px", "batch", "remat", "temporaries", "counted", "ratio")


def remat_table(flags) -> None:
    lines = []
    for name, recipe, mesh, batch, px in chosen(REMAT_ROWS, flags.only):
        for policy in flags.remat.split(","):
            sizes, bucket = MeshConfig.parse(mesh), (px, px)
            target = target_of(
                topology.parse(name), recipe, sizes, batch, bucket=bucket, remat=policy
            )
            lines.append([name, str(px), str(batch), policy, *remat_cells(target)])
            tell(" | ".join(lines[-1]))
    print(table(REMAT_COLUMNS, lines))


def remat_cells(target: PlanTarget) -> list[str]:
    try:
        stats = compilation.compiled(target, compilation.CompileLimits(gib=8.0))
    except UserError as error:
        return [f"not compiled: {error}", "", ""]
    if stats.wanted is not None:
        return [f"does not fit: {stats.wanted / GIB:.1f} GiB in all", "", ""]
    try:
        where = (target.axes, target.bucket, target.topology.jax_platform)
        how = (target.config, target.stage_config, target.config.remat)
        counted = memory.activation_bytes(*how, *where, stats.counted["parameters"])
    except UserError:
        return [f"{stats.temporaries / GIB:.2f}", "", ""]
    figures = (stats.temporaries / GIB, sum(counted.values()) / GIB)
    return [f"{figure:.2f}" for figure in (*figures, figures[0] / figures[1])]


# ---- device ----


def arrays(target: PlanTarget, program: programs.Program) -> tuple:
    """(fresh state, batch of random values, key) for a train step."""
    from pixart_jax.parallel import rules
    from pixart_jax.training import stages
    from pixart_jax.training.batches import put
    from pixart_jax.training.state import fresh_params, state_from

    made, mesh = program.parts, program.mesh
    key = jax.device_put(jax.random.key(0), rules.replicated(mesh))
    rng, rows = np.random.default_rng(0), {}
    shapes = stages.abstract_batch(target.config, target.stage_config, target.bucket, mesh)
    for name, shape in shapes.items():
        whole = shape.dtype.kind in "iu"
        values = np.full(shape.shape, 5) if whole else rng.normal(size=shape.shape)
        rows[name] = values.astype(shape.dtype)
    params = fresh_params(made.task.init, key, made.abstract)
    state = state_from(params, made.optimizer, made.abstract)
    return jax.block_until_ready((state, put(rows, rules.batch_sharding(mesh)), key))


def device_figures(flags) -> None:
    device = jax.local_devices()[0]
    chip = chip_of(device.device_kind)
    if chip is None or not device.memory_stats():
        raise UserError(f"{device.device_kind}: not a device of parallel/chips.py")
    mesh = make_mesh(sizes := MeshConfig(data=1, fsdp=-1))
    where = topology.Topology(device.device_kind, chip.name, (mesh.size,))
    target = target_of(where, flags.recipe, sizes, flags.batch_size, remat=flags.remat)
    program = programs.train_step(target, mesh)
    compiled = program.traced.lower().compile()
    stats = compilation.stats(target, program, compiled)
    state, batch, key = arrays(target, program)
    state, metrics = jax.block_until_ready(compiled(state, batch, key))
    begun = time.perf_counter()
    for _ in range(flags.steps):
        state, metrics = compiled(state, batch, key)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - begun) / flags.steps
    peak = device.memory_stats()["peak_bytes_in_use"]
    predicted = estimate.time_of(target, stats, chip).step
    name = f"{mesh.size} × {device.device_kind}, {flags.recipe}, batch {flags.batch_size}"
    figures = {"memory GiB": (stats.total / GIB, peak / GIB), "step s": (predicted, seconds)}
    lines = [
        [name, what, f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}"] for what, (a, b) in figures.items()
    ]
    print(table((f"remat {flags.remat}", "", "predicted", "measured", "ratio"), lines))


def main(argv: list[str]) -> int:
    parser = flag_parser(__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    names = ("table", "distil", "remat", "device")
    whole, distil, remat, device = (what.add_parser(name) for name in names)
    for each in (whole, distil, remat):
        each.add_argument("--only", metavar="TOPOLOGY", help="only the rows of this hardware")
    for each in (whole, distil):
        each.add_argument("--print", action="store_true", help="leave the page as it is")
    remat.add_argument("--remat", default=",".join(POLICIES), metavar="NAMES")
    device.add_argument("--recipe", default="xl2_256_sam")
    device.add_argument("--batch-size", type=int, default=64)
    device.add_argument("--remat", default="full")
    device.add_argument("--steps", type=int, default=10)
    flags = parser.parse_args(argv)
    if flags.what != "device":
        jax.config.update("jax_platforms", "cpu")  # this process computes nothing
    work = {"table": plan_table, "distil": plan_table, "remat": remat_table}
    work.get(flags.what, device_figures)(flags)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

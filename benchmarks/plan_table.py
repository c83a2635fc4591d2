"""The planner's table in docs/pods.md: XL/2 at 256, 512 and 1024 px on slices of TPUs and on a host
of H200s.

python benchmarks/plan_table.py [--only TOPOLOGY] [--print]

Compiles what is not kept yet (under $PIXART_JAX_CACHE/plans), one program at a time, and writes the
table between the markers of the page. It needs the compilers, not the devices: pip install
'jax[tpu]', and for H200 JAX's CUDA plugin; a row whose compiler is not here says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pixart_jax import cli
from pixart_jax.config import Config, MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.parallel.chips import GIB
from pixart_jax.parallel.mesh import resolve_sizes
from pixart_jax.planning import compilation, estimate, plan, report, topology
from pixart_jax.planning.target import PlanTarget
from pixart_jax.training import recipes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pods.md"
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"

# recipe: the nearest multiple of 512 to its batch, so that one batch divides on every row.
BATCHES = {"xl2_256_sam": 11_264, "xl2_512_aesthetic": 2_560, "xl2_1024_ms": 512}
# (topology, slices, mesh, {recipe: micro-batches a step where not 1})
ROWS = (
    ("v5e:16x16", 1, "data=16,fsdp=16", {}),
    ("v5p:4x4x4", 1, "data=4,fsdp=16", {}),
    ("v6e:4x4", 1, "fsdp=16,data=1", {"xl2_256_sam": 4, "xl2_512_aesthetic": 4, "xl2_1024_ms": 8}),
    ("v5e:16x16", 2, "data=32,fsdp=16", {}),
    ("h200:8", 1, "fsdp=8,data=1", {"xl2_256_sam": 2, "xl2_512_aesthetic": 2, "xl2_1024_ms": 4}),
)


def target(recipe: str, name: str, slices: int, mesh: str, accumulate: int) -> PlanTarget:
    """The step of a recipe on a row's hardware."""
    config: Config = recipes.load(recipes.find(recipe))
    stage = config.stages[0]
    optimizer = dataclasses.replace(stage.optimizer, accumulate=accumulate)
    stage = dataclasses.replace(stage, batch_size=BATCHES[recipe], optimizer=optimizer)
    where = topology.parse(name, slices)
    sizes = MeshConfig.parse(mesh)
    made = PlanTarget(
        where,
        dataclasses.replace(config, stages=(stage,), mesh=sizes),
        0,
        resolve_sizes(sizes, where.size),
        plan.largest(stage),
    )
    plan.check(made)
    return made


def row(made: plan.Plan) -> list[str]:
    """A line of the table."""
    f, t, stage = made.stats, made.time, made.target.stage_config
    micro = f" in {stage.optimizer.accumulate}" if stage.optimizer.accumulate > 1 else ""
    first = [
        f"{min(made.target.bucket)} px",
        made.target.topology.label,
        made.target.label.replace(" ", ", "),
        f"{made.target.batch:,}{micro}",
        f.remat,
        f"{report.data(f.total)} of {report.data(made.usable)}",
    ]
    if t is None:
        return [*first, "–", "–", "–", "does not fit", "–"]
    return [
        *first,
        f"{made.image_flops * made.target.batch / 1e15:,.1f}",
        f"{1e3 * t.step * made.mean:,.0f} ({1e3 * t.compute:,.0f} / {1e3 * t.memory:,.0f} / "
        f"{1e3 * t.exposed:,.0f})",
        f"{made.images_per_second:,.0f}",
        f"{made.mfu:.0%}",
        f"{made.cost.days:,.2f} d, {made.cost.usd:,.0f} USD",
    ]


HEADER = [
    "size",
    "hardware",
    "mesh",
    "batch (micro-batches)",
    "remat",
    "memory a device",
    "model PFLOP a step",
    "step, ms (compute / memory / exposed)",
    "images/s",
    "MFU",
    "the stage",
]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a topology's name")
    parser.add_argument(
        "--print", action="store_true", help="show the table and leave the page as it is"
    )
    options = parser.parse_args(argv)
    chosen = [r for r in ROWS if options.only in (None, r[0])]
    if not chosen:
        raise UserError(
            f"--only {options.only}: one of {', '.join(dict.fromkeys(r[0] for r in ROWS))}"
        )
    lines, worst = [], [0.0, 0.0, 0.0]
    todo = [(recipe, *r) for recipe in BATCHES for r in chosen]
    for recipe, name, slices, mesh, micro in tqdm(
        todo, desc="compiling", unit="program", dynamic_ncols=True
    ):
        wanted = target(recipe, name, slices, mesh, micro.get(recipe, 1))
        try:
            made = plan.make(wanted, compilation.CompileLimits())
        except UserError as error:
            tqdm.write(f"{recipe}, {name}: {error}", file=sys.stderr)
            lines.append([wanted.stage_config.name, name, *["–"] * 8, str(error)])
            continue
        lines.append(row(made))
        tqdm.write(" | ".join(lines[-1]), file=sys.stderr)
        figures = (
            made.stats.compile_seconds,
            made.stats.compile_cpu_seconds,
            made.stats.host_peak / GIB,
        )
        worst = [max(pair) for pair in zip(worst, figures, strict=True)]
    text = written(lines)
    if options.print or options.only:
        print(text)
        return 0
    page = PAGE.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise UserError(f"{PAGE} lacks the markers {BEGIN} and {END}")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")
    print(
        f"{PAGE.name}: {len(lines)} programs; at most {worst[0]:.0f} s ({worst[1]:.0f} s of CPU) "
        f"and {worst[2]:.1f} GiB"
    )
    return 0


def written(lines: list[list[str]]) -> str:
    """The table and what it rests on."""
    notes = (
        "Made by `python benchmarks/plan_table.py`. PixArt XL/2, bfloat16, AdamW and EMA, remat "
        "`auto`; the 1024 px recipe at the largest of its 40 buckets for memory and the mean over "
        "them for time. Memory is compiled, model FLOPs are counted from shapes. Times, images/s, "
        f"MFU and cost are estimates: {estimate.ASSUMPTIONS}. Cost: the recipe's steps at this "
        "batch, at the list prices of pixart_jax/parallel/chips.py."
    )
    return "\n".join(
        [
            notes,
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
            *("| " + " | ".join(line) + " |" for line in lines),
        ]
    )


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""What each remat policy's step holds beside its state on hardware that is not here, by its
compiler, beside what is counted from shapes.

    PYTHONPATH=.venv/compilers python benchmarks/remat_memory.py [--only TOPOLOGY] [--remat NAMES]
    [--json FILE]

XL/2's train steps as tests/planning/test_programs_for_hardware.py compiles them, one policy after
the other. *temporaries*: the compiler's word, GiB a device. *counted*: all terms of
training/memory.py; *kept* is that of the policy. *strictly*: the temporaries less the terms
that are there whatever the policy is, over *kept* alone. What was compiled once is kept under
$PIXART_JAX_CACHE/plans. `make test` installs the compilers into .venv/compilers.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # this process computes nothing
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.speed.contest import tell  # noqa: E402
from benchmarks.speed.table import Record, render  # noqa: E402
from pixart_jax import cli  # noqa: E402
from pixart_jax.config import MeshConfig  # noqa: E402
from pixart_jax.errors import UserError  # noqa: E402
from pixart_jax.models import remat  # noqa: E402
from pixart_jax.planning import activations, compilation, jobs, topology  # noqa: E402
from pixart_jax.training import recipes  # noqa: E402

# (topology, recipe, mesh, batch, pixels)
TARGETS = (
    ("v5e:4x4", "xl2_256_sam", "fsdp=16,data=1", 256, 256),
    ("v5p:2x2x4", "xl2_1024_ms", "fsdp=16,data=1", 32, 1024),
    ("h200:1", "xl2_512_aesthetic", "fsdp=1,data=1", 32, 512),
)
POLICIES = ("full", "attention_out", "dots", "dots_attention", "offload", "none")
COLUMNS = (
    "hardware",
    "px",
    "batch",
    "remat",
    "temporaries",
    "counted",
    "ratio",
    "kept",
    "strictly",
    "compiled in",
)


def job(name: str, recipe: str, mesh: str, batch: int, side: int, policy: str) -> jobs.PlanTarget:
    config = recipes.load(recipes.find(recipe))
    stage = dataclasses.replace(config.stages[0], batch_size=batch)
    where, sizes = topology.parse(name), MeshConfig.parse(mesh)
    config = dataclasses.replace(config, stages=(stage,), mesh=sizes, remat=policy)
    return jobs.PlanTarget(where, config, 0, jobs.resolve_mesh(sizes, where.size), (side, side))


def cells(made: jobs.PlanTarget, facts: jobs.CompiledStats) -> list[str]:
    first = [
        made.topology.name,
        str(made.bucket[0]),
        str(made.stage_config.batch_size),
        made.config.remat,
    ]
    seconds = f"{facts.compile_seconds:.0f} s"
    if facts.wanted is not None:
        return [
            *first,
            f"does not fit: {facts.wanted / jobs.GIB:.1f} GiB in all",
            "",
            "",
            "",
            "",
            seconds,
        ]
    gib = facts.temporaries / jobs.GIB
    try:
        counted = activations.counted(made, facts.counted["parameters"])
    except UserError:
        return [*first, f"{gib:.2f}", "", "", "", "", seconds]
    kept, whole = counted["kept"], sum(counted.values())
    own = facts.temporaries - sum(counted[name] for name in activations.ANY_POLICY)
    return [
        *first,
        f"{gib:.2f}",
        f"{whole / jobs.GIB:.2f}",
        f"{facts.temporaries / whole:.2f}",
        f"{kept / jobs.GIB:.2f}",
        f"{own / kept:.2f}" if kept else "",
        seconds,
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=[target[0] for target in TARGETS])
    parser.add_argument("--remat", default=",".join(POLICIES), metavar="NAMES")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the run to this file")
    flags = parser.parse_args(argv)
    policies = flags.remat.split(",")
    for policy in policies:
        remat.policy(policy)
    title = "Temporaries of a train step, GiB a device"
    record = Record(flags.json, argv, columns=list(COLUMNS), title=title, cells=[])
    for target in TARGETS:
        for policy in policies:
            if flags.only in (None, target[0]):
                made = job(*target, policy)
                try:
                    line = cells(
                        made, compilation.compiled(made, compilation.CompileLimits(gib=8.0))
                    )
                except UserError as fault:
                    line = [
                        target[0],
                        str(target[4]),
                        str(target[3]),
                        policy,
                        f"not compiled: {fault}",
                        *[""] * 5,
                    ]
                record.run["cells"].append(line)
                record.write()
                tell(" | ".join(line))
    print(render(COLUMNS, record.run["cells"], title))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

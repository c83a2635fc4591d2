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
from pixart_jax.parallel.chips import GIB  # noqa: E402
from pixart_jax.parallel.mesh import resolve_sizes  # noqa: E402
from pixart_jax.planning import compilation, topology  # noqa: E402
from pixart_jax.planning.target import CompiledStats, PlanTarget  # noqa: E402
from pixart_jax.training import memory, recipes  # noqa: E402

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


def target_of(name: str, recipe: str, mesh: str, batch: int, side: int, policy: str) -> PlanTarget:
    config = recipes.load(recipes.find(recipe))
    stage = dataclasses.replace(config.stages[0], batch_size=batch)
    where, sizes = topology.parse(name), MeshConfig.parse(mesh)
    config = dataclasses.replace(config, stages=(stage,), mesh=sizes, remat=policy)
    return PlanTarget(where, config, 0, resolve_sizes(sizes, where.size), (side, side))


def cells(made: PlanTarget, stats: CompiledStats) -> list[str]:
    first = [
        made.topology.name,
        str(made.bucket[0]),
        str(made.stage_config.batch_size),
        made.config.remat,
    ]
    seconds = f"{stats.compile_seconds:.0f} s"
    if stats.wanted is not None:
        return [
            *first,
            f"does not fit: {stats.wanted / GIB:.1f} GiB in all",
            "",
            "",
            "",
            "",
            seconds,
        ]
    gib = stats.temporaries / GIB
    try:
        counted = memory.activation_bytes(
            made.config,
            made.stage_config,
            made.config.remat,
            made.axes,
            made.bucket,
            made.topology.jax_platform,
            stats.counted["parameters"],
        )
    except UserError:
        return [*first, f"{gib:.2f}", "", "", "", "", seconds]
    kept, whole = counted["kept"], sum(counted.values())
    own = stats.temporaries - sum(counted[name] for name in memory.ANY_POLICY)
    return [
        *first,
        f"{gib:.2f}",
        f"{whole / GIB:.2f}",
        f"{stats.temporaries / whole:.2f}",
        f"{kept / GIB:.2f}",
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
                made = target_of(*target, policy)
                try:
                    line = cells(
                        made, compilation.compiled(made, compilation.CompileLimits(gib=8.0))
                    )
                except UserError as error:
                    line = [
                        target[0],
                        str(target[4]),
                        str(target[3]),
                        policy,
                        f"not compiled: {error}",
                        *[""] * 5,
                    ]
                record.run["cells"].append(line)
                record.write()
                tell(" | ".join(line))
    print(render(COLUMNS, record.run["cells"], title))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

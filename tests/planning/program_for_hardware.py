"""Compile one XL/2 program of a recipe for a topology and print as JSON what is in it.

python program_for_hardware.py TOPOLOGY RECIPE PART MESH BATCH SIDE REMAT: PART 'step' or 'denoise'
(20 steps with guidance), MESH as data,fsdp,context,tensor, SIDE in pixels. Runs in a process with
planning.topology.environment.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path

import jax

from pixart_jax.models.flops import train_flops
from pixart_jax.planning import activations, hlo, topology
from pixart_jax.planning.arithmetic import products
from pixart_jax.planning.jobs import PlanTarget, SamplingWorkload
from pixart_jax.planning.programs import program
from pixart_jax.weights.component import Transformer

LARGE = 1 << 20  # bytes; smaller parameters may be copied


def job_of(
    name: str, recipe: str, part: str, mesh: str, batch: str, side: str, remat: str
) -> PlanTarget:
    spec = importlib.util.spec_from_file_location(
        "recipe", Path(__file__).parents[2] / "configs" / f"{recipe}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module
    spec.loader.exec_module(module)
    config = module.get_config()
    stage = dataclasses.replace(config.stages[0], batch_size=int(batch))
    config = dataclasses.replace(config, stages=(stage,), remat=remat)
    drawing = (
        None if part == "step" else SamplingWorkload(int(batch), int(side), int(side), 20, 4.5)
    )
    return PlanTarget(
        topology.parse(name),
        config,
        0,
        tuple(map(int, mesh.split(","))),
        (int(side),) * 2,
        drawing,
        part,
    )


def kernels(text: str) -> dict[str, int]:
    """Names of the attention kernels in a program's text, and how many calls of each are written
    there."""
    calls = [
        i
        for instructions in hlo.computations(text)[0].values()
        for i in instructions
        if i.opcode == "custom-call"
    ]
    names = [i.name.split(".")[0] for i in calls if i.name.startswith("splash_")]
    names += [
        target
        for i in calls
        if (target := i.rest.partition('custom_call_target="')[2].partition('"')[0]).startswith(
            "__cudnn$"
        )
    ]
    return dict(collections.Counter(names))


def shapes_of_parameters(job: PlanTarget, mesh) -> set[tuple[int, ...]]:
    """As a device holds them, and of the stacked ones a block's alone, as held and gathered."""
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        Transformer.abstract(job.config.model, "bfloat16", mesh).params
    ):
        stacked = path[0].key == "blocks"
        found |= {
            s
            for s in (leaf.sharding.shard_shape(leaf.shape), leaf.shape[stacked:])
            if 2 * math.prod(s) >= LARGE and len(s) > 1
        }
    return found


def main(name: str, *what: str) -> None:
    job = job_of(name, *what)
    made = program(job)
    compiled = made.traced.lower().compile()
    text = compiled.as_text()
    found = {
        "kernels": kernels(text),
        "rearranged": hlo.rearranged(text, shapes_of_parameters(job, made.mesh)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
    if job.part == "step":
        counted = found["counted"] = activations.counted(job, made.counted["parameters"])
        own = found["temporaries"] - sum(counted[name] for name in activations.ANY_POLICY)
        found["ratio"] = found["temporaries"] / sum(counted.values())
        # beside what the policy keeps alone
        found["strictly"] = own / counted["kept"] if counted["kept"] else None
        one = train_flops(job.config.model, *job.bucket, job.stage_config.data.max_text_tokens)
        found["passes"] = (
            3 * products(made.traced.jaxpr.jaxpr).flops / (one * job.stage_config.batch_size)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

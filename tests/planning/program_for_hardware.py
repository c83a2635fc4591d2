"""Compile one XL/2 program of a recipe for a topology and print as JSON what is in it.

python program_for_hardware.py TOPOLOGY RECIPE PART MESH BATCH SIDE REMAT: PART 'step' or 'denoise'
(20 steps with guidance), MESH as data,fsdp,context,tensor, SIDE in pixels. Runs in a process with
planning.topology.environment.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import re
import sys

import jax

from pixart_jax.models.flops import train_flops
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.planning import hlo, topology
from pixart_jax.planning.matmul_cost import matmul_cost
from pixart_jax.planning.programs import program
from pixart_jax.planning.target import PlanTarget, SamplingWorkload
from pixart_jax.training import memory, recipes
from pixart_jax.weights.component import Transformer

LARGE = 1 << 20  # bytes; smaller parameters may be copied
_OPERAND = re.compile(r"%([\w.\-]+)")


def target_of(
    name: str, recipe: str, part: str, mesh: str, batch: str, side: str, remat: str
) -> PlanTarget:
    config = recipes.load(recipes.find(recipe))
    stage = dataclasses.replace(config.stages[0], batch_size=int(batch))
    config = dataclasses.replace(config, stages=(stage,), remat=remat)
    sizes, bucket, work = tuple(map(int, mesh.split(","))), (int(side), int(side)), None
    if part == "denoise":
        work = SamplingWorkload(int(batch), *bucket, SamplingConfig().with_defaults())
    return PlanTarget(topology.parse(name), config, 0, sizes, bucket, work, part)


def counted(target: PlanTarget, parameters: float) -> dict[str, float]:
    """Bytes of activations by term. parameters: bytes of a device's share of them."""
    platform, config = target.topology.jax_platform, target.config
    sizes = (target.axes, target.bucket, platform, parameters)
    return memory.activation_bytes(config, target.stage_config, config.remat, *sizes)


def rearranged(text: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """Copies and transposes, as written, of arrays of these shapes in any order of their
    dimensions, without those of 1.

    Not counted: asynchronous copies to another memory of the chip (copy-start), copies of a
    broadcast, with which a loop's sums begin, and what a loop over stacked blocks does each time:
    it takes a slice out of the stack and puts one in.
    """

    def outline(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(n for n in shape if n > 1))

    wanted, found, seen = set(map(outline, shapes)), [], set()
    for run in hlo.executed(text):
        if run.computation in seen:
            continue
        seen.add(run.computation)
        made = {i.name: i.opcode for i in run.instructions}
        updates = [i.rest for i in run.instructions if i.opcode == "dynamic-update-slice"]
        put = {name for rest in updates for name in _OPERAND.findall(rest)}
        for i in run.instructions:
            if i.opcode in ("copy", "transpose") and i.name not in put:
                source = made.get(_OPERAND.findall(i.rest)[0])
                if outline(i.dims) in wanted and source not in ("broadcast", "dynamic-slice"):
                    line = f"{run.loop}: {i.name} = {i.shape} {i.opcode}({i.rest[:200]}"
                    found.append(line)
    return found


def kernels(text: str) -> dict[str, int]:
    """Names of the attention kernels in a program's text, and how many calls of each are written
    there."""
    names = []
    for i in itertools.chain.from_iterable(hlo.computations(text)[0].values()):
        if i.opcode == "custom-call":
            target = i.rest.partition('custom_call_target="')[2].partition('"')[0]
            names += [i.name.split(".")[0]] if i.name.startswith("splash_") else []
            names += [target] if target.startswith("__cudnn$") else []
    return dict(collections.Counter(names))


def shapes_of_parameters(target: PlanTarget, mesh) -> set[tuple[int, ...]]:
    """As a device holds them, and of the stacked ones a block's alone, as held and gathered."""
    found: set[tuple[int, ...]] = set()
    params = Transformer.abstract(target.config.model, "bfloat16", mesh).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        whole = leaf.shape[path[0].key == "blocks" :]
        found |= {leaf.sharding.shard_shape(leaf.shape), whole}
    return {shape for shape in found if 2 * math.prod(shape) >= LARGE and len(shape) > 1}


def main(name: str, *what: str) -> None:
    target = target_of(name, *what)
    made = program(target)
    compiled = made.traced.lower().compile()
    text = compiled.as_text()
    found = {
        "kernels": kernels(text),
        "rearranged": rearranged(text, shapes_of_parameters(target, made.mesh)),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }
    if target.part == "step":
        terms = found["counted"] = counted(target, made.counted["parameters"])
        own = found["temporaries"] - sum(terms[name] for name in memory.ANY_POLICY)
        found["ratio"] = found["temporaries"] / sum(terms.values())
        # beside what the policy keeps alone
        found["strictly"] = own / terms["kept"] if terms["kept"] else None
        stage = target.stage_config
        one = train_flops(target.config.model, *target.bucket, stage.data.max_text_tokens)
        flops = matmul_cost(made.traced.jaxpr.jaxpr).flops
        found["passes"] = 3 * flops / (one * stage.batch_size)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

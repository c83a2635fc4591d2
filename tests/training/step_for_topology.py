"""The step of test_step_compiled.small, compiled for a topology without its hardware. Prints JSON:
bytes on one device."""

from __future__ import annotations

import json
import re
import sys

import jax
from training.test_step_compiled import small

from pixart_jax.config import MeshConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.planning import hlo, topology
from pixart_jax.training import stages
from pixart_jax.training.frozen import FrozenSpec
from pixart_jax.training.memory import bytes_per_device
from pixart_jax.training.step import compiled_step


def main(name: str) -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), topology.devices(topology.parse(name)))
    config = small()
    stage = config.stages[0]
    made = stages.build_stage(config, stage, FrozenSpec(config), mesh)
    batch = stages.abstract_batch(config, stage, (64, 64), mesh)
    step = compiled_step(config, stage, made, mesh)
    traced = step.trace(made.abstract, batch, stages.abstract_key(mesh))
    program = traced.lower().compile()
    memory = program.memory_analysis()
    gathered, copied = {"bf16": 0, "f32": 0}, 0
    for run in hlo.executed(program.as_text()):
        for instruction in run.instructions:
            if instruction.opcode in ("all-gather", "all-gather-start"):
                kind = re.search(r"bf16|f32", instruction.shape)
                gathered[kind[0]] += int(run.times) * max(instruction.arrays)
            one_f32 = instruction.shape.startswith("f32") and len(instruction.arrays) == 1
            if instruction.opcode == "copy" and one_f32:
                copied += int(run.times) * instruction.arrays[0]
    found = {
        "state": bytes_per_device(made.abstract),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(made.abstract.params)),
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "gathered": gathered,
        "copied": copied,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])

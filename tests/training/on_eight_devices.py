"""Train a small transformer on 1 and on 8 simulated devices and print what came of it as JSON.
Needs XLA's 8 host devices.

python on_eight_devices.py FOLDER ACCUMULATE DATA: the mesh is data DATA × fsdp 8/DATA.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run

from pixart_jax.config import MeshConfig, OptimizerConfig
from pixart_jax.parallel.mesh import make_mesh
from tests.parallel.replicated import large_replicated


def curve(config, mesh) -> tuple[list[float], list[str], list[int]]:
    """(losses, large arrays that are whole on every device, bytes of the state on each device)."""
    losses, state, _ = tiny_run.steps_on(config, mesh, 6)
    held = {device: 0 for device in mesh.devices.flat}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += np.asarray(shard.data).nbytes
    return losses, large_replicated(state), list(held.values())


def main(folder: Path) -> None:
    config = tiny_run.curriculum(folder)
    rates = {"learning_rate": 1e-3, "warmup_steps": 0, "clip": 1.0, "ema": 0.9, "eps": 1e-8}
    optimizer = OptimizerConfig(**rates, accumulate=int(sys.argv[2]))
    changes = {"start": "fresh", "batch_size": 16, "optimizer": optimizer}
    stage = dataclasses.replace(config.stages[1], **changes)
    model = dataclasses.replace(config.model, width=256, depth=2)
    config = dataclasses.replace(config, stages=(stage,), model=model)
    one = curve(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    eight = curve(config, make_mesh(MeshConfig(data=int(sys.argv[3]), fsdp=-1)))
    print(json.dumps({"one": one, "eight": eight}))


main(Path(sys.argv[1]))

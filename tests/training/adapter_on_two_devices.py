"""Train an adapter on one device and on an fsdp mesh of two and print what came of it as JSON:
python adapter_on_two_devices.py MODULE WORLD […]. MODULE: of tasks/, with a_run(WORLD, …). Needs
XLA's two host devices."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from pixart_jax.config import MeshConfig
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training.batches import open_loader, put
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.initialization import initial_state
from pixart_jax.training.memory import bytes_per_device
from pixart_jax.training.stages import build_stage
from pixart_jax.training.step import compiled_step


def curve(config, mesh):
    """(losses, the trained factors, bytes of the base's largest kernels on one device)."""
    frozen = Frozen(config, Path("."))
    loader = open_loader(config, 0, frozen, None, mesh)
    parts = build_stage(config, config.stages[0], frozen, mesh).load_base(mesh)
    state = initial_state(config, 0, parts, None, print)
    step = compiled_step(config, config.stages[0], parts, mesh)
    losses = []
    for number in range(4):
        batch = put(loader.batch(number), rules.batch_sharding(mesh))
        state, metrics = step(state, batch, jax.random.key(number))
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params), bytes_per_device(parts.base["blocks"]["attn"])


def main(module: str, world: str, *more: str) -> None:
    config = importlib.import_module(f"tasks.{module}").a_run(Path(world), *more)
    one = curve(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    two = curve(config, make_mesh(MeshConfig(data=1, fsdp=2)))
    pairs = zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True)
    difference = max(float(np.abs(a - b).max()) for a, b in pairs)
    losses, base = (one[0], two[0]), (one[2], two[2])
    print(json.dumps({"losses": losses, "difference": difference, "base": base}))


main(*sys.argv[1:])

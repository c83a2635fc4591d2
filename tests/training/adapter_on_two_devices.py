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
import tiny_run

from pixart_jax.config import MeshConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training.memory import bytes_per_device


def curve(config, mesh):
    """(losses, the trained factors, bytes of the base's largest kernels on one device)."""
    losses, state, parts = tiny_run.steps_on(config, mesh, 4)
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

"""The real step of small_run on 8 simulated devices: how many bytes this process grows by from
before its arrays are made to the step's height. Prints JSON. Needs XLA's 8 host devices.

All is compiled and run once before the first reading, so that the compiler's memory and the
runtime's are in both; the allocator gives freed memory back at once (MALLOC_MMAP_THRESHOLD_ in the
environment, malloc_trim). The system's high-water mark is set back once the arrays lie where they
belong, and read after two steps: the memory of simulated devices is the process's own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import small_run

from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training import stages
from pixart_jax.training.batches import put
from pixart_jax.training.frozen import FrozenSpec
from pixart_jax.training.state import fresh_params, state_from
from pixart_jax.training.step import compiled_step


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main(fsdp: int, remat: str) -> None:
    config = small_run.get_config(remat=remat)
    stage = config.stages[0]
    mesh = make_mesh(small_run.MeshConfig(data=-1, fsdp=fsdp))
    made = stages.build_stage(config, stage, FrozenSpec(config), mesh)
    shapes = stages.abstract_batch(config, stage, small_run.BUCKET, mesh)
    step = compiled_step(config, stage, made, mesh)
    compiled = step.trace(made.abstract, shapes, stages.abstract_key(mesh)).lower().compile()
    key = jax.device_put(jax.random.key(0), rules.replicated(mesh))

    def arrays():
        params = fresh_params(made.task.init, jax.random.key(0), made.abstract)
        state = state_from(params, made.optimizer, made.abstract)
        batch = put(rows(shapes), rules.batch_sharding(mesh))
        return jax.block_until_ready((state, batch))

    def steps(state, batch):
        for _ in range(2):
            state, metrics = compiled(state, batch, key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    steps(*arrays())
    settle()
    before = status("VmRSS")
    held = arrays()
    settle()
    made_of_arrays = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    loss = steps(*held)
    grown, arrays_bytes = status("VmHWM") - before, made_of_arrays - before
    print(json.dumps({"grown": grown, "arrays": arrays_bytes, "loss": loss}))


def rows(shapes) -> dict[str, np.ndarray]:
    """Numbers of the batch's shapes."""
    rng = np.random.default_rng(0)

    def values(s) -> np.ndarray:
        whole = s.dtype.kind in "iu"
        return (np.full(s.shape, 5) if whole else rng.normal(size=s.shape)).astype(s.dtype)

    return {name: values(shape) for name, shape in shapes.items()}


def settle() -> None:
    """What was freed goes back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


main(int(sys.argv[1]), sys.argv[2])

"""The planner's memory beside a real device's: one train step, planned and run where this program
runs. Needs a GPU or TPU.

python benchmarks/plan_against_device.py [--recipe xl2_256_sam] [--batch-size 64] [--remat full]

Prints predicted and measured bytes of the first device (memory_stats()'s peak_bytes_in_use), and
predicted and measured seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pixart_jax import cli
from pixart_jax.errors import UserError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="xl2_256_sam")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(argv)

    import jax
    import numpy as np

    from pixart_jax.config import MeshConfig
    from pixart_jax.parallel import rules
    from pixart_jax.parallel.chips import chip_of
    from pixart_jax.parallel.mesh import make_mesh
    from pixart_jax.planning import compilation, estimate, plan, programs, topology
    from pixart_jax.planning.target import PlanTarget
    from pixart_jax.training import recipes, stages
    from pixart_jax.training.batches import put
    from pixart_jax.training.state import fresh_params, state_from

    device = jax.local_devices()[0]
    chip = chip_of(device.device_kind)
    if chip is None or not device.memory_stats():
        raise UserError(
            f"{device.device_kind}: no device of the table of chips; "
            "tests/planning/test_memory.py does this on a CPU"
        )
    config = recipes.load(recipes.find(options.recipe))
    sizes = MeshConfig(data=1, fsdp=-1)
    stage = dataclasses.replace(config.stages[0], batch_size=options.batch_size)
    config = dataclasses.replace(config, stages=(stage,), mesh=sizes, remat=options.remat)
    mesh, bucket = make_mesh(sizes), plan.largest(stage)
    where = topology.Topology(device.device_kind, chip.name, (mesh.size,))

    target = PlanTarget(where, config, 0, mesh.devices.shape, bucket)
    program = programs.train_step(target, mesh)
    compiled = program.traced.lower().compile()
    stats = compilation.stats(target, program, compiled)
    made, shapes = program.parts, stages.abstract_batch(config, stage, bucket, mesh)

    key = jax.device_put(jax.random.key(0), rules.replicated(mesh))
    rng = np.random.default_rng(0)
    rows = {
        n: (rng.normal(size=s.shape) if s.dtype.kind not in "iu" else np.full(s.shape, 5)).astype(
            s.dtype
        )
        for n, s in shapes.items()
    }
    batch = put(rows, rules.batch_sharding(mesh))
    state = state_from(
        fresh_params(made.task.init, key, made.abstract), made.optimizer, made.abstract
    )
    state, _ = jax.block_until_ready(compiled(state, batch, key))
    begun = time.perf_counter()
    for _ in range(options.steps):
        state, metrics = compiled(state, batch, key)
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - begun) / options.steps
    measured = device.memory_stats()["peak_bytes_in_use"]
    predicted = estimate.time_of(target, stats, chip)
    print(
        f"{mesh.size} × {device.device_kind}, {options.recipe}, batch {options.batch_size}, remat "
        f"{options.remat}"
    )
    print(
        f"memory   predicted {stats.total / 2**30:.3f} GiB   measured {measured / 2**30:.3f} GiB  "
        f" ratio {measured / stats.total:.3f}"
    )
    print(
        f"step     predicted {predicted.step:.4f} s   measured {seconds:.4f} s   ratio "
        f"{seconds / predicted.step:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))

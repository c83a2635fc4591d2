"""Open the newest save of a folder on this process's mesh, compare it with what was written first,
and save it anew.

python checkpoint_on_meshes.py FOLDER FSDP [COORDINATOR INDEX]: with the last two, one of two
processes. Prints the number of devices and "equal". Saves are named so that a later mesh's is the
newer one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax

if len(sys.argv) > 3:
    jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[4]))

import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from pixart_jax.config import MeshConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training.bad_steps import StepGuard
from pixart_jax.training.checkpoint import Checkpointer, RunPosition
from pixart_jax.training.state import TrainState


def values(seed: int):
    """The arrays that every mesh must find, as numpy."""
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(size=(64, 32)).astype(np.float32),
        "half": rng.normal(size=(48,)).astype(jnp.bfloat16),
        "b": np.arange(7.0, dtype=np.float32),
    }


def main(folder: Path, fsdp: int) -> None:
    mesh = make_mesh(MeshConfig(data=-1, fsdp=fsdp))
    axes = {"w": ("fsdp",), "half": (("data", "fsdp"),), "b": ()}

    def placed(value, *axes):
        value, sharding = np.asarray(value), NamedSharding(mesh, PartitionSpec(*axes))
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    params, moments = (
        {name: placed(value, *axes[name]) for name, value in tree.items()}
        for tree in (values(0), values(1))
    )
    numbers = (np.int32(1), np.int32(0), np.int32(5), np.float32(0.1), np.float32(0.2))
    state = TrainState(placed(np.int32(3)), params, (moments,), StepGuard(*map(placed, numbers)))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(folder, keep=3) as saves:
        latest = saves.latest()
        if latest is not None:
            restored = saves.restore(latest, abstract)
            for mine, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
                assert mine.sharding == theirs.sharding
                for a, b in zip(mine.addressable_shards, theirs.addressable_shards, strict=True):
                    np.testing.assert_array_equal(
                        np.asarray(a.data, np.float32), np.asarray(b.data, np.float32)
                    )
            state = restored
        total = (latest or 0) + 4
        saves.save(RunPosition(0, total, total), state)
        saves.wait()
        for a, b in zip(
            jax.tree.leaves(saves.restore(total, abstract)), jax.tree.leaves(state), strict=True
        ):
            whole = NamedSharding(mesh, PartitionSpec())
            same = jax.jit(lambda x, y: (x == y).all(), out_shardings=whole)(a, b)
            assert bool(same)
    print(jax.device_count(), "equal")


main(Path(sys.argv[1]), int(sys.argv[2]))

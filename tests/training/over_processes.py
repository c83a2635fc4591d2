"""What several processes do together; run by the launcher: python over_processes.py rows | export
FOLDER | agree FOLDER WHAT."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import numpy as np

from pixart_jax import cli
from pixart_jax.config import MeshConfig
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.parallel import processes, rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training.batches import put, rows_of
from pixart_jax.weights.component import Transformer

# No dimension of 1, so that every large array is cut; the stack of a block's fc1 is an eighth of
# all.
MODEL = TransformerConfig(
    depth=8, width=512, heads=8, caption_width=64, text_tokens=16, sample_size=4
)
SIZE = 16


def rows() -> None:
    """For each mesh of these devices: this process's rows, and that the batch put from them is the
    whole one on every device."""
    found = {}
    count = jax.device_count()
    whole = {
        "x": np.arange(SIZE * 3, dtype=np.float32).reshape(SIZE, 3),
        "key": np.array([f"k{n}" for n in range(SIZE)]),
    }
    whole_axis = [f"{axis}={count}" for axis in ("data", "fsdp", "tensor")]
    parts = ["data=2,tensor=-1", "tensor=2", "context=2,fsdp=-1", "data=1,context=-1"]
    for sizes in whole_axis + parts:
        sharding = rules.batch_sharding(make_mesh(MeshConfig.parse(sizes)))
        mine = rows_of(sharding, SIZE)
        batch = put({name: array[mine] for name, array in whole.items()}, sharding)
        assert set(batch) == {"x"} and batch["x"].shape == (SIZE, 3)
        assert batch["x"].sharding == sharding
        for shard in batch["x"].addressable_shards:
            np.testing.assert_array_equal(shard.data, whole["x"][shard.index])
        found[sizes] = mine.tolist()
    print(json.dumps({"rows": found}), flush=True)


def parameters(mesh=None):
    """The same values however they lie."""
    module, example = Transformer(MODEL, {}).module, Transformer._example(MODEL)
    boxed = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    leaves, tree = jax.tree.flatten(rules.unboxed(boxed))
    values = [
        np.random.default_rng(n).standard_normal(leaf.shape, np.float32)
        for n, leaf in enumerate(leaves)
    ]
    if mesh is None:
        return tree.unflatten(values)

    def place(whole: np.ndarray, sharding) -> jax.Array:
        return jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i].copy())

    shardings = rules.parameter_shardings(boxed, mesh)
    return jax.tree.map(place, tree.unflatten(values), shardings)


def export(folder: Path) -> None:
    """Save the model from parameters over all processes; how much this one's memory grew at most,
    in bytes."""
    params = parameters(make_mesh(MeshConfig.parse("fsdp=2,tensor=-1")))
    warm = {name: params[name] for name in ("final_table",)}
    jax.block_until_ready((params, warm))
    Transformer(MODEL, params).save(folder / "first")  # compiles the gathers
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    Transformer(MODEL, params).save(folder / "sharded")
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"grown": resident("VmHWM") - before, "total": total}), flush=True)


def resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def main(argv: list[str]) -> int:
    start, (what, *rest) = processes.pop_distributed_flags(argv)
    processes.initialize(start)
    if what == "agree":
        own = Path(rest[0]) / (f"of-{jax.process_index()}" if rest[1] == "folder" else "all")
        config = f"config {jax.process_index() if rest[1] == 'config' else ''}"
        processes.assert_same_config(config, own, patience=1)
    elif what == "rows":
        rows()
    else:
        export(Path(rest[0]))
    return 0


if __name__ == "__main__":
    sys.exit(processes.run_with_peers(lambda: cli.run(main)))

"""Run one train step of a stage on 1 device and on several meshes of 8 simulated ones; print as
JSON what came of each.

python train_step_on_meshes.py FOLDER STAGE MESH …: STAGE is a number of tiny_run's curriculum (0:
the DiT, 1: the transformer), MESH as train.py's --mesh takes it, with ",remat=NAME" or
",kv_compression=2" after it if wanted. Needs XLA's 8 host devices.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training"))
import tiny_run

from pixart_jax.config import MeshConfig, OptimizerConfig
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training.batches import open_loader, put
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.stages import build_stage
from pixart_jax.training.state import abstract_state, state_from
from pixart_jax.training.step import CompiledStep

# No parameter has a side of the batch, of the image tokens or of the text tokens, so that shapes
# tell them apart.
BATCH, BUCKET, TOKENS, TEXT_TOKENS = 24, (128, 96), 48, 40
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")


def keep_gradient() -> optax.GradientTransformation:
    """First in a chain: its state is the gradient, which a test can read."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, _, __=None: (grads, grads),
    )


def collectives(program: str) -> dict[str, list[tuple[int, ...]]]:
    """Kind → shapes of floating-point results of each such instruction in a compiled program's
    text."""
    text = re.sub(r"/\*.*?\*/", "", program)
    found: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in COLLECTIVES}
    for results, kind in re.findall(rf"= ([^=\n]*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", text):
        for shape in re.findall(r"(?:bf16|f32)\[([\d,]*)\]", results):
            found[kind].append(tuple(int(n) for n in shape.split(",") if n))
    return found


def recipe(folder: Path, stage: int, mesh: str):
    """(the config of one stage, its mesh's sizes)."""
    options = dict(part.split("=") for part in mesh.split(","))
    changes = {name: options.pop(name) for name in ("remat", "kv_compression") if name in options}
    config = tiny_run.curriculum(folder)
    if not (folder / "wide").exists():
        tiny_run.shards(folder / "wide", (BUCKET,), count=BATCH)
    data = {"source": str(folder / "wide"), "buckets": (BUCKET,), "max_text_tokens": TEXT_TOKENS}
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, clip=1.0, ema=0.9, eps=1e-8)
    chosen = replace(config.stages[stage], start="fresh", batch_size=BATCH, optimizer=optimizer)
    chosen = replace(chosen, data=replace(chosen.data, **data))
    ratio = int(changes.get("kv_compression", 1))
    fields = {"width": 256, "heads": 8, "depth": 2, "text_tokens": TEXT_TOKENS}
    fields |= {"kv_compression": ratio, "kv_compression_layers": (1,) if ratio > 1 else ()}
    model = replace(config.model, size_conditions=False, **fields)
    sizes = MeshConfig.parse(",".join(f"{name}={value}" for name, value in options.items()))
    remat = changes.get("remat", "none")
    return replace(config, stages=(chosen,), model=model, mesh=sizes, remat=remat), sizes


def first_params(task) -> dict:
    """Host arrays, a little off the fresh ones: the zeros of output projections and modulations
    would stop the gradient."""
    fresh = jax.device_get(jax.jit(lambda key: rules.unboxed(task.init(key)))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (leaf + 0.02 * rng.standard_normal(leaf.shape)).astype(np.float32), fresh
    )


def step(config, mesh, params=None):
    """(loss, gradients on the host, the compiled program, parameters' shapes, the parameters) of
    the first step."""
    frozen = Frozen(config, Path("."))
    loader = open_loader(config, 0, frozen, None, mesh)
    stage = build_stage(config, config.stages[0], frozen, mesh)
    boxed = jax.eval_shape(stage.task.init, jax.random.key(0))
    params = params or first_params(stage.task)
    optimizer = optax.chain(keep_gradient(), stage.optimizer)
    abstract = abstract_state(boxed, optimizer, mesh)
    state = state_from(params, optimizer, abstract)
    how = {"task": stage.task, "optimizer": optimizer, "rate": lambda _: 1e-3}
    compiled = CompiledStep(mesh, abstract, **how)
    batch = put(loader.batch(0), rules.batch_sharding(mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.ACTIVATION_RULES):
        program = compiled.jitted.lower(state, batch, jax.random.key(7)).compile()
    state, metrics = program(state, batch, jax.random.key(7))
    gradients = jax.device_get(state.opt_state[0])
    return float(metrics["loss"]), gradients, program, rules.unboxed(boxed), params


def difference(gradients, reference) -> tuple[float, str]:
    """The largest ‖difference‖ of a parameter's gradient over its norm, and whose it is. A gradient
    that is zero but for rounding (the keys' bias: softmax does not see it) counts against a
    hundred-thousandth of the whole gradient's norm.
    """
    leaves = jax.tree_util.tree_leaves_with_path(reference)
    floor = 1e-5 * math.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for _, leaf in leaves))
    found = []
    for (path, leaf), ours in zip(leaves, jax.tree.leaves(gradients), strict=True):
        gap = float(np.linalg.norm(ours - leaf) / max(np.linalg.norm(leaf), floor))
        found.append((gap, jax.tree_util.keystr(path, simple=True, separator="/")))
    return max(found)


def main(folder: Path, stage: int, meshes: list[str]) -> None:
    found, single = {}, {}
    for name in meshes:
        config, sizes = recipe(folder, stage, name)
        if config.model not in single:
            alone = make_mesh(MeshConfig(), jax.devices()[:1])
            single[config.model] = step(replace(config, remat="none"), alone)
        loss, gradients, _, _, params = single[config.model]
        print(f"compiling {name}", file=sys.stderr, flush=True)
        ours, theirs, program, shapes, _ = step(config, make_mesh(sizes), params)
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        found[name] = {
            "loss": abs(ours - loss) / abs(loss),
            "gradient": difference(theirs, gradients),
            "parameters": sorted({x.shape[path[0].key == "blocks" :] for path, x in leaves}),
            **collectives(program.as_text()),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

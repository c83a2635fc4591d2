"""One train step of XL/2 at full size on this machine: 256 px, batch 1, fp32 masters. Prints JSON:
loss, seconds, peak RSS in bytes."""

from __future__ import annotations

import json
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import MeshConfig, ObjectiveConfig, OptimizerConfig, StageConfig
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training.batches import put
from pixart_jax.training.optimizer import make_optimizer, schedule
from pixart_jax.training.state import abstract_state, fresh_params, state_from
from pixart_jax.training.step import CompiledStep
from pixart_jax.training.tasks.denoising import DiffusionObjective
from pixart_jax.training.tasks.text_to_image import TextToImage


def main(ema: float) -> None:
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    module = PixArtTransformer(TransformerConfig.preset("XL/2"), dtype=jnp.float32, remat="full")
    objective = DiffusionObjective(ObjectiveConfig(), 0.18215)
    task = TextToImage(module, objective, None, 0, StageConfig("stage"))
    config = OptimizerConfig(ema=ema)  # the recipe's AdamW: lr 2e-5, weight decay 0.03, clip 0.01
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    optimizer = make_optimizer(config, 1000, 1, rules.logical_names(boxed))
    abstract = abstract_state(boxed, optimizer, mesh)
    state = state_from(fresh_params(task.init, jax.random.key(0), abstract), optimizer, abstract)
    step = CompiledStep(
        mesh, abstract, task=task, optimizer=optimizer, rate=schedule(config, 1000, 1)
    )
    rng = np.random.default_rng(0)
    batch = {
        "mean": rng.normal(size=(1, 32, 32, 4)).astype(np.float32),
        "std": np.full((1, 32, 32, 4), 0.1, np.float32),
        "text_states": rng.normal(size=(1, 120, 4096)).astype(jnp.bfloat16),
        "text_lengths": np.array([77], np.int32),
        "size": np.full((1, 2), 256, np.float32),
        "aspect_ratio": np.ones((1,), np.float32),
    }
    losses = []
    for number in range(2):
        begun = time.perf_counter()
        state, metrics = step(state, put(batch, rules.batch_sharding(mesh)), jax.random.key(number))
        losses.append(float(metrics["loss"]))
        seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    parameters -= state.params["null_caption"].size
    found = {"losses": losses, "seconds": seconds, "peak": peak, "parameters": parameters}
    print(json.dumps({**found, "ema": ema}))


main(float(sys.argv[1]))

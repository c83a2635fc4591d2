"""PixArt-α to PixArt-Σ on the embedded world: the shipped transformer moves to another autoencoder,
to twice the tokens, and to compressed keys and values, in one stage.

The autoencoder is configs/shapes_vae.py's with other random numbers; nothing of the transformer is
reset. Expected: two objects bound right in at least 90 of 100 pictures after
2,000 steps, 15 minutes on two quiet cores; from random weights (--stages.0.start fresh) as many
steps do not bind (docs/sigma.md).
    python train.py configs/shapes_vae.py --workdir runs/shapes_vae2 --seed 1
    python train.py configs/shapes_sigma.py --workdir runs/shapes_sigma
"""

from __future__ import annotations

import dataclasses

from configs import shapes
from pixart_jax.config import Config, PreviewConfig, StageConfig


def get_config(steps: int = 2_000) -> Config:
    world = shapes.get_config()
    _, text, _ = world.stages
    model = dataclasses.replace(
        world.model, text_tokens=128, kv_compression=2, kv_compression_layers=(3, 4)
    )
    stage = StageConfig(
        name="sigma",
        start="assets/shapes",
        steps=steps,
        batch_size=32,
        data=text.data,
        objective=shapes.OBJECTIVE,
        optimizer=shapes.optimizer(steps, 1e-3, schedule="cosine", final_fraction=0.02),
    )
    return dataclasses.replace(
        world,
        name="shapes_sigma",
        stages=(stage,),
        model=model,
        vae="runs/shapes_vae2/model",
        preview=PreviewConfig(every=500, prompts=shapes.PROMPTS, steps=20, guidance=2.0),
    )

"""A student of the shipped model that samples in 4 steps without guidance: latent consistency
distillation, as of PixArt-δ, at guidance 2 (w = 1).

    python train.py configs/shapes_lcm.py --workdir runs/shapes_lcm
    python sample.py --model runs/shapes_lcm/model --prompt "a large red star"
"""

from __future__ import annotations

import dataclasses

from configs import shapes
from pixart_jax.config import Config, LcmConfig, OptimizerConfig, PreviewConfig, StageConfig

# what the shipped model was trained on last
DATA = dataclasses.replace(shapes.AESTHETIC, captions=shapes.CAPTIONS)


def optimizer(learning_rate: float, **fields) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate,
        warmup_steps=50,
        schedule="cosine",
        final_fraction=0.05,
        weight_decay=0.0,
        eps=1e-8,
        clip=1.0,
        **fields,
    )


def student(task: str, steps: int, **fields) -> Config:
    """The recipe of a student of the shipped model. fields: of StageConfig."""
    stage = StageConfig(
        name=task,
        task=task,
        start="assets/shapes",
        steps=steps,
        batch_size=32,
        data=DATA,
        objective=dataclasses.replace(shapes.OBJECTIVE, condition_dropout=0.0),
        **fields,
    )
    return dataclasses.replace(
        shapes.get_config(),
        name=f"shapes_{task}",
        stages=(stage,),
        log_every=50,
        checkpoint_every=250,
        preview=PreviewConfig(every=500, prompts=shapes.PROMPTS),
    )


def get_config(steps: int = 1_000) -> Config:
    options = LcmConfig(w=1.0)
    return student("lcm", steps, lcm=options, optimizer=optimizer(1e-4, b2=0.99, ema=0.95))

"""A ControlNet of the shipped model on the edges of scenes in which objects lie anywhere, turned
and of any size; prompts name colours alone ("a red object and a blue object").

The edge maps give the shapes and their places; the captions name colours only.
    python train.py configs/shapes_control.py --workdir runs/shapes_control
"""

from __future__ import annotations

import dataclasses

from configs import shapes
from pixart_jax.config import Config, DataConfig, PreviewConfig, StageConfig


def get_config(steps: int = 20_000) -> Config:
    world = shapes.get_config()
    stage = StageConfig(
        name="control",
        task="controlnet",
        start="assets/shapes",
        steps=steps,
        batch_size=32,
        data=DataConfig(
            source="tfds:shapes/free",
            captions=(("shapeless", 1.0),),
            max_text_tokens=64,
            condition="canny",
        ),
        objective=shapes.OBJECTIVE,
        optimizer=shapes.optimizer(steps, 4e-3, schedule="cosine", final_fraction=0.02),
    )
    return dataclasses.replace(
        world,
        name="shapes_control",
        stages=(stage,),
        preview=PreviewConfig(every=1000, steps=20, guidance=2.0),
    )

"""configs/shapes.py with a quarter of the steps: the three stages from scratch in minutes on two
CPU cores (`make demo`).

Eight minutes of training; the third stage keeps to 64 px. Single objects come out right, two
objects are bound right in about three of four pictures (docs/shapes.md).
"""

from configs.shapes import get_config as shapes
from pixart_jax.config import Config, DataConfig


def get_config() -> Config:
    return shapes(
        pixel_steps=600,
        text_steps=4_000,
        aesthetic_steps=700,
        aesthetic_data=DataConfig(source="tfds:shapes/lit", max_text_tokens=64),
        captions=(("short", 0.5), ("dense", 0.35), ("brief", 0.15)),
        name="shapes_demo",
    )

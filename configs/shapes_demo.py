"""configs/shapes.py with a quarter of the steps: the three stages from scratch in minutes on two CPU cores (`make demo`)."""

from configs.shapes import get_config as shapes
from pixart_jax.config import Config


def get_config() -> Config:
    return shapes(pixel_steps=600, text_steps=4_000, aesthetic_steps=500, name="shapes_demo")

"""A run whose step takes a few hundred MB on 8 simulated devices: large enough to be measured,
small enough for a test machine."""

from __future__ import annotations

from pixart_jax.config import Config, DataConfig, MeshConfig, OptimizerConfig, StageConfig
from pixart_jax.models.configs import TransformerConfig

DEVICES = 8
BUCKET = (128, 128)


def get_config(batch_size: int = 64, **changes) -> Config:
    stage = StageConfig(
        "words",
        "text_to_image",
        steps=100,
        batch_size=batch_size,
        start="fresh",
        data=DataConfig(source="data/none", buckets=(BUCKET,), max_text_tokens=32),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=2, clip=1.0, ema=0.99, eps=1e-8),
    )
    settings = {
        "name": "small",
        "stages": (stage,),
        "vae": "models/none",
        "text_encoder": "models/none",
        "model": TransformerConfig(
            depth=6, width=384, heads=6, caption_width=128, text_tokens=32, sample_size=16
        ),
        "mesh": MeshConfig(data=1, fsdp=-1),
        "compute_dtype": "float32",
        "remat": "full",
    }
    return Config(**{**settings, **changes})

"""Stage 2 of the paper, text-image alignment: SAM pictures with dense captions at 256 px.

Paper: 10M images captioned by LLaVA, 150K steps at batch 178 × 64 (its released config says 176 a
GPU), 672 V100 days (305 A100 days by the paper's factor of 2.2); 1.7 billion samples seen.
Expected: pictures that follow long captions, objects, counts and places, with SAM's look (blurred
faces); stage 3 brings taste.

Starts from stage 1 through the re-parameterisation: at t = 500 the model equals the class-free DiT
to rounding.
Data: a folder of encoded shards (`python -m pixart_jax caption`, then `encode`).
"""

from __future__ import annotations

from configs import _xl2
from pixart_jax.config import Config, DataConfig


def get_config() -> Config:
    stage = _xl2.stage(
        "256_sam",
        steps=150_000,
        batch_size=178 * 64,
        data=DataConfig(source="data/sam_256", buckets=((256, 256),)),
        start="runs/xl2_256_imagenet/model",
        position_base=16,
        position_scale=1.0,
    )
    return _xl2.run(stage, latent_size=32)

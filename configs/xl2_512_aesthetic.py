"""Stage 3 of the paper, aesthetics, second part: 512 px.

Paper: 14M images, 100K steps at batch 40 × 64, 320 V100 days (145 A100 days by the paper's factor
of 2.2); 256M samples seen.
Expected: the 256 px model's pictures with four times the pixels. The position table is rebuilt for
base 32, scale 1; all other weights go on.

Data: a folder of encoded shards at 512 px.
"""

from __future__ import annotations

from configs import _xl2
from pixart_jax.config import Config, DataConfig


def get_config() -> Config:
    stage = _xl2.stage(
        "512_aesthetic",
        steps=100_000,
        batch_size=40 * 64,
        data=DataConfig(source="data/aesthetic_512", buckets=((512, 512),)),
        start="runs/xl2_256_aesthetic/model",
        position_base=32,
        position_scale=1.0,
    )
    return _xl2.run(stage, latent_size=64)

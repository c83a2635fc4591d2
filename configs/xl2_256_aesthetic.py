"""Stage 3 of the paper, aesthetics, first part: 256 px.

Paper: 14M images (4M JourneyDB, 10M internal), 90K steps at batch 178 × 64, 416 V100 days (189 A100
days by the paper's factor of 2.2); 1.0 billion samples seen.
Expected: the alignment of stage 2 with the look of curated pictures. Published at 256 px: FID-30K
7.32, with a separately fine-tuned checkpoint that was not released; others measured the public one
at 25 to 38.

Data: a folder of encoded shards.
"""

from __future__ import annotations

from configs import _xl2
from pixart_jax.config import Config, DataConfig


def get_config() -> Config:
    stage = _xl2.stage(
        "256_aesthetic",
        steps=90_000,
        batch_size=178 * 64,
        data=DataConfig(source="data/aesthetic_256", buckets=((256, 256),)),
        start="runs/xl2_256_sam/model",
        position_base=16,
        position_scale=1.0,
    )
    return _xl2.run(stage, latent_size=32)

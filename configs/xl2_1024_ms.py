"""Stage 3 of the paper, aesthetics, last part: 1024 px in 40 aspect ratios.

Paper: 14M images, 16K steps at batch 12 × 32, 160 V100 days (73 A100 days by the paper's factor of
2.2); 6.1M samples seen.
Expected: what was released as PixArt-α-XL-2-1024-MS. Published for PixArt-α: GenEval 0.48;
T2I-CompBench colour .6690, shape .4927, texture .6477, spatial .2064, non-spatial .3197, complex
.3433 (final version, a checkpoint that was not released).

The model is told the original image's size and the bucket's ratio (size_conditions; the embedders
start fresh, 493,056 parameters more). Position table: base 64, scale 2. Data: a folder of encoded
shards in the buckets of the 1024 table.
"""

from __future__ import annotations

from configs import _xl2
from pixart_jax.config import Config, DataConfig
from pixart_jax.data import buckets


def get_config() -> Config:
    stage = _xl2.stage(
        "1024_ms",
        steps=16_000,
        batch_size=12 * 32,
        data=DataConfig(source="data/aesthetic_1024", buckets=tuple(buckets.TABLES[1024].values())),
        start="runs/xl2_512_aesthetic/model",
        position_base=64,
        position_scale=2.0,
    )
    return _xl2.run(stage, latent_size=128, size_conditions=True)

"""Stage 1 of the paper, pixel dependency: a class-conditional DiT-XL/2 on ImageNet at 256 px.

Paper: 1M images, 300K steps at batch 128 × 8, 88 V100 days (40 A100 days by the paper's factor of
2.2); 307M samples seen.
Expected: a DiT whose class-free samples have the look of natural pictures; its weights start stage
2 through the re-parameterisation. The public DiT-XL/2 checkpoint does the same: `python -m
pixart_jax convert DiT-XL-2-256x256.pt models/dit`, and xl2_256_sam with `start` naming that folder.
The official code ships neither this stage nor the re-parameterisation.

Data: a folder of encoded shards with labels (`python -m pixart_jax encode --help`). Position scale
1.0 as in the official 256 px configs and in DiT; diffusers and PixArt-Σ write 0.5 here.
"""

from __future__ import annotations

from configs import _xl2
from pixart_jax.config import Config, DataConfig, PreviewConfig


def get_config() -> Config:
    stage = _xl2.stage(
        "256_imagenet",
        task="class_conditional",
        steps=300_000,
        batch_size=128 * 8,
        data=DataConfig(source="data/imagenet_256", buckets=((256, 256),)),
        start="fresh",
        position_base=16,
        position_scale=1.0,
    )
    return _xl2.run(
        stage,
        latent_size=32,
        text_encoder=None,  # no text in this stage
        preview=PreviewConfig(every=10_000),
    )

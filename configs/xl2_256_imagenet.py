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

from pixart_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
)
from pixart_jax.models.transformer import TransformerConfig


def get_config() -> Config:
    stage = StageConfig(
        name="256_imagenet",
        task="class_conditional",
        steps=300_000,
        batch_size=128 * 8,
        data=DataConfig(source="data/imagenet_256", buckets=((256, 256),)),
        optimizer=OptimizerConfig(
            name="adamw",
            learning_rate=2e-5,
            weight_decay=0.03,
            b1=0.9,
            b2=0.999,
            eps=1e-10,
            schedule="constant",
            warmup_steps=1000,
            clip=0.01,
            ema=0.9999,
        ),
        objective=ObjectiveConfig(prediction="epsilon", learned_range=True, condition_dropout=0.1),
        start="fresh",
        position_base=16,
        position_scale=1.0,
    )
    return Config(
        name="xl2_256_imagenet",
        stages=(stage,),
        model=TransformerConfig.preset("XL/2", sample_size=32),
        vae="models/sd-vae-ft-ema",
        text_encoder=None,  # no text in this stage
        mesh=MeshConfig(data=1, fsdp=-1),
        compute_dtype="bfloat16",
        remat="auto",
        checkpoint_every=2000,
        preview=PreviewConfig(every=10_000),
    )

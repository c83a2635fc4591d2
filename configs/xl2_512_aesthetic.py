"""Stage 3 of the paper, aesthetics, second part: 512 px.

Paper: 14M images, 100K steps at batch 40 × 64, 320 V100 days (145 A100 days by the paper's factor
of 2.2); 256M samples seen.
Expected: the 256 px model's pictures with four times the pixels. The position table is rebuilt for
base 32, scale 1; all other weights go on.

Data: a folder of encoded shards at 512 px.
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

PROMPTS = (
    "a small cactus with a happy face in the desert",
    "a lighthouse on a cliff at dusk, waves below, oil painting",
    "three red apples on a white plate beside a blue cup",
    "an old bicycle leaning on a yellow wall",
)


def get_config() -> Config:
    stage = StageConfig(
        name="512_aesthetic",
        task="text_to_image",
        steps=100_000,
        batch_size=40 * 64,
        data=DataConfig(source="data/aesthetic_512", buckets=((512, 512),)),
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
        start="runs/xl2_256_aesthetic/model",
        position_base=32,
        position_scale=1.0,
    )
    return Config(
        name="xl2_512_aesthetic",
        stages=(stage,),
        model=TransformerConfig.preset("XL/2", sample_size=64),
        vae="models/sd-vae-ft-ema",
        text_encoder="models/t5-v1_1-xxl",
        mesh=MeshConfig(data=1, fsdp=-1),
        compute_dtype="bfloat16",
        remat="auto",
        checkpoint_every=2000,
        preview=PreviewConfig(every=5000, prompts=PROMPTS),
    )

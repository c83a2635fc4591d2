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
        name="256_sam",
        task="text_to_image",
        steps=150_000,
        batch_size=178 * 64,
        data=DataConfig(source="data/sam_256", buckets=((256, 256),)),
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
        start="runs/xl2_256_imagenet/model",
        position_base=16,
        position_scale=1.0,
    )
    return Config(
        name="xl2_256_sam",
        stages=(stage,),
        model=TransformerConfig.preset("XL/2", sample_size=32),
        vae="models/sd-vae-ft-ema",
        text_encoder="models/t5-v1_1-xxl",
        mesh=MeshConfig(data=1, fsdp=-1),
        compute_dtype="bfloat16",
        remat="auto",
        checkpoint_every=2000,
        preview=PreviewConfig(every=5000, prompts=PROMPTS),
    )

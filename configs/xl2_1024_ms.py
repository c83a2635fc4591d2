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

from pixart_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
)
from pixart_jax.data import buckets
from pixart_jax.models.transformer import TransformerConfig

PROMPTS = (
    "a small cactus with a happy face in the desert",
    "a lighthouse on a cliff at dusk, waves below, oil painting",
    "three red apples on a white plate beside a blue cup",
    "an old bicycle leaning on a yellow wall",
)


def get_config() -> Config:
    stage = StageConfig(
        name="1024_ms",
        task="text_to_image",
        steps=16_000,
        batch_size=12 * 32,
        data=DataConfig(source="data/aesthetic_1024", buckets=tuple(buckets.TABLES[1024].values())),
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
        start="runs/xl2_512_aesthetic/model",
        position_base=64,
        position_scale=2.0,
    )
    return Config(
        name="xl2_1024_ms",
        stages=(stage,),
        model=TransformerConfig.preset("XL/2", sample_size=128, size_conditions=True),
        vae="models/sd-vae-ft-ema",
        text_encoder="models/t5-v1_1-xxl",
        mesh=MeshConfig(data=1, fsdp=-1),
        compute_dtype="bfloat16",
        remat="auto",
        checkpoint_every=2000,
        preview=PreviewConfig(every=5000, prompts=PROMPTS),
    )

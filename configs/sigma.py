"""PixArt-Σ from PixArt-α: the weak-to-strong training of arXiv 2403.04692, five stages as one run.

    stage    px    images  steps  batch    lr    V100 days
    vae      256   33M     8K     64 × 16  2e-5  5          SDXL's VAE, scale 0.13025
    text     256   33M     80K    64 × 16  2e-5  50         300 tokens, two kinds of captions
    512      512   18M     10K    48 × 32  2e-5  30         40 aspect ratios
    1024     1024  18M     5K     12 × 32  2e-5  50         without size conditions
    kv       1024  18M     5K     16 × 32  2e-5  20         KV compression 2, layers 14 … 27

Read in the official repository (PixArt-sigma 1ce521a, configs/pixart_sigma_config: img256_internal,
img512_internalms, img1024_internalms and its _kvcompress, and their base PixArt_xl2_internal):
batches a device (64, 48, 12, 16; the last three are comments beside smaller ones), lr 2e-5, CAME
with its decays and epsilons, the √(batch / 256) rule, clip 0.01, warm-up (1000; 500 in kv), EMA,
captions half and half, dropout 0.1, 300 tokens, positions' scales 0.5, 1, 2 and compressed layers.
Said by its authors: at most 32 V100 (issue 24); start from α's aesthetic 256 px weights, with 33M
images (issue 50). From memory of the paper's appendix and verified nowhere: steps, devices of each
stage, days, 18M, and 120 tokens in vae. By that memory the last two stages' lr is 1e-5; the
configs', and readers' notes of the paper, say 2e-5 throughout.

Cost: 155 V100 days beyond PixArt-α, 70 A100 days by the paper's factor of 2.2. Expected: what was
released as PixArt-Sigma-XL-2-1024-MS after the fourth stage; the compressed weights never were.
Nobody has run it with this code: configs/shapes_sigma.py is the same path on the embedded world.

Data: encoded shards, those of a stage by its VAE (docs/sigma.md); start: α's 256 px weights, the
last aesthetic ones.
"""

from __future__ import annotations

import dataclasses

from configs import _xl2
from pixart_jax.config import Config, DataConfig, StageConfig
from pixart_jax.data import buckets
from pixart_jax.models.configs import TransformerConfig

START = "runs/xl2_256_aesthetic/model"
VAE, TEXT = "models/sdxl-vae", "models/t5-v1_1-xxl"
CAPTIONS = (("prompt", 0.5), ("sharegpt4v", 0.5))


def model(pixels: int, tokens: int = 300, **fields) -> TransformerConfig:
    """XL/2 without size conditions, whose positions span what those of 512 px do."""
    scale = pixels / 512
    sizes = {"sample_size": pixels // 8, "position_scale": scale, "text_tokens": tokens}
    return TransformerConfig.preset("XL/2", **sizes, **fields)


def stage(
    name: str, pixels: int, steps: int, batch: int, *, lr=2e-5, warmup=1000, **fields
) -> StageConfig:
    """A stage with PixArt-Σ's optimizer. fields: of StageConfig; its model is of 300 tokens."""
    own = fields.pop("model", model(pixels))
    sides = buckets.TABLES[pixels].values() if pixels > 256 else ((256, 256),)
    data = DataConfig(
        f"data/sigma_{pixels}",
        captions=CAPTIONS,
        buckets=tuple(sides),
        max_text_tokens=own.text_tokens,
    )
    made = _xl2.stage(name, steps=steps, batch_size=batch, data=data, model=own, **fields)
    optimizer = dataclasses.replace(
        made.optimizer,
        name="came",
        learning_rate=lr,
        weight_decay=0.0,
        warmup_steps=warmup,
        sqrt_scale_from=256,
    )
    # the released null caption is the states of ""
    objective = dataclasses.replace(made.objective, null_condition="empty")
    return dataclasses.replace(made, optimizer=optimizer, objective=objective)


def run(name: str, *stages: StageConfig) -> Config:
    """A run whose model is its last stage's."""
    config = _xl2.run(stages[0], latent_size=32, text_encoder=TEXT)
    last = stages[-1].model
    assert last is not None
    return dataclasses.replace(config, name=name, stages=stages, model=last, vae=VAE)


def get_config() -> Config:
    compressed = model(1024, kv_compression=2, kv_compression_layers=tuple(range(14, 28)))
    return run(
        "sigma",
        stage("vae", 256, 8_000, 64 * 16, start=START, model=model(256, tokens=120)),
        stage("text", 256, 80_000, 64 * 16),
        stage("512", 512, 10_000, 48 * 32),
        stage("1024", 1024, 5_000, 12 * 32),
        stage("kv", 1024, 5_000, 16 * 32, warmup=500, model=compressed),
    )

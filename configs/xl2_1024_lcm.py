"""PixArt-δ: PixArt-α at 1024 px distilled to 4 steps by latent consistency.

Paper (arXiv 2401.05252) and code: 2 GPUs of 32 GB for under a day, hardly any gain after 5K steps;
lr 2e-5 · √(batch / 256), guidance scale w = 4.5, 50 solver times, EMA 0.95. A step costs twice an
ordinary one. Expected: PixArt-LCM-XL-2-1024-MS.

    python train.py configs/xl2_1024_lcm.py --workdir runs/lcm --stages.0.data.source data/latents
LCM-LoRA, whose target is the student itself; the code's rank 32 and alpha 8:
    … --lora.rank 32 --lora.alpha 8 --stages.0.optimizer.ema 0
"""

from __future__ import annotations

import dataclasses

from configs import _xl2
from pixart_jax.config import Config, DataConfig
from pixart_jax.data import buckets

MODEL = "PixArt-alpha/PixArt-XL-2-1024-MS"


def get_config() -> Config:
    stage = _xl2.stage(
        "1024_lcm",
        task="lcm",
        steps=5_000,
        batch_size=24,
        data=DataConfig("data/aesthetic_1024", buckets=tuple(buckets.TABLES[1024].values())),
        start=MODEL,
        position_base=64,
        position_scale=2.0,
    )
    stage = dataclasses.replace(
        stage,
        # released folders hold no null caption
        objective=dataclasses.replace(
            stage.objective, null_condition="empty", condition_dropout=0.0
        ),
        optimizer=dataclasses.replace(
            stage.optimizer, weight_decay=0.0, warmup_steps=100, ema=0.95, sqrt_scale_from=256
        ),
    )
    config = _xl2.run(stage, latent_size=128, size_conditions=True, text_encoder=MODEL)
    return dataclasses.replace(config, vae=MODEL, checkpoint_every=500)

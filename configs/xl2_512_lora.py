"""A LoRA of PixArt-α XL/2 at 512 px on captioned pictures of one's own.

diffusers' and the official scripts' setting: every layer but the modulation tables, rank 16, AdamW
at a constant 1e-4 without EMA. The model is the frozen base, in bfloat16.
Data: any source of docs/data_sources.md; here a folder of pictures with captions in NAME.txt.
    python train.py configs/xl2_512_lora.py --workdir runs/lora --stages.0.data.source folder:DIR
"""

from __future__ import annotations

import dataclasses

from configs import _xl2
from pixart_jax.config import Config, DataConfig, LoraConfig

MODEL = "PixArt-alpha/PixArt-XL-2-512x512"


def get_config() -> Config:
    stage = _xl2.stage(
        "512_lora",
        steps=2_000,
        batch_size=4,
        data=DataConfig(
            "folder:data/pictures", captions=(("caption", 1.0),), buckets=((512, 512),)
        ),
        start=MODEL,
        lora=LoraConfig(rank=16),
    )
    stage = dataclasses.replace(
        stage,
        # released folders hold no null caption
        objective=dataclasses.replace(stage.objective, null_condition="empty"),
        optimizer=dataclasses.replace(
            stage.optimizer, learning_rate=1e-4, eps=1e-8, clip=1.0, ema=0.0, warmup_steps=100
        ),
    )
    config = _xl2.run(stage, latent_size=64, text_encoder=MODEL)
    preview = dataclasses.replace(config.preview, every=500)
    return dataclasses.replace(config, vae=MODEL, preview=preview, checkpoint_every=200)

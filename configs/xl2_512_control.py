"""A ControlNet of PixArt-α XL/2 at 512 px on the HED edges of captioned pictures (PixArt-δ).

The official script's setting at its batch of 48: 13 copies of blocks in fp32 masters over the
frozen model in bfloat16, AdamW at 2e-5, clipped at 0.01. Edges are made once, when the pictures are
encoded; canny needs no weights.
Data: any source of docs/data_sources.md; here a folder of pictures with captions in NAME.txt.
    python train.py configs/xl2_512_control.py --workdir runs/control \\
        --stages.0.data.source folder:DIR --stages.0.data.condition-weights ControlNetHED.pth
"""

from __future__ import annotations

import dataclasses

from configs import _xl2
from configs.xl2_512_lora import MODEL
from pixart_jax.config import Config, DataConfig


def get_config() -> Config:
    stage = _xl2.stage(
        "512_control",
        steps=20_000,
        batch_size=48,
        data=DataConfig(
            "folder:data/pictures",
            captions=(("caption", 1.0),),
            buckets=((512, 512),),
            condition="hed",
        ),
        start=MODEL,
        task="controlnet",
    )
    stage = dataclasses.replace(
        stage,
        # released folders hold no null caption
        objective=dataclasses.replace(stage.objective, null_condition="empty"),
        optimizer=dataclasses.replace(stage.optimizer, learning_rate=2e-5, ema=0.999),
    )
    config = _xl2.run(stage, latent_size=64, text_encoder=MODEL)
    preview = dataclasses.replace(config.preview, every=1000, prompts=())
    return dataclasses.replace(config, vae=MODEL, preview=preview)

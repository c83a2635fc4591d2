"""PixArt-α at 512 px distilled to 4 steps by trajectory distribution matching, from prompts alone.

The authors' demo (arXiv 2503.06674): guidance 4.5, lr 4e-6 and 2e-5 of the fake score; they report
500 steps, 2 A800 hours. Saved every 100 steps: run on, such training saturates colours.

    python -m pixart_jax encode --prompts FILE --out data/prompts.safetensors --model MODEL
    python train.py configs/xl2_512_tdm.py --workdir runs/tdm
"""

from __future__ import annotations

import dataclasses

from configs import _xl2
from pixart_jax.config import Config, DataConfig, OptimizerConfig, TdmConfig

MODEL = "PixArt-alpha/PixArt-XL-2-512x512"


def get_config() -> Config:
    stage = _xl2.stage(
        "512_tdm",
        task="tdm",
        steps=500,
        batch_size=32,
        data=DataConfig("states:data/prompts.safetensors", buckets=((512, 512),)),
        start=MODEL,
        tdm=TdmConfig(guidance=4.5),
    )
    optimizer = OptimizerConfig(
        learning_rate=4e-6,
        schedule="cosine",
        warmup_steps=50,
        weight_decay=0.01,
        b1=0.0,
        b2=0.95,
        eps=1e-8,
        clip=1.0,
        ema=0.0,
    )
    # released folders hold no null caption
    objective = dataclasses.replace(stage.objective, null_condition="empty")
    stage = dataclasses.replace(stage, objective=objective, optimizer=optimizer)
    config = _xl2.run(stage, latent_size=64, text_encoder=MODEL)
    return dataclasses.replace(config, vae=MODEL, checkpoint_every=100, keep_every=100)

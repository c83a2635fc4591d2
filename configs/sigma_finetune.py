"""Fine-tune PixArt-Σ, or a relative such as the 900M model of 42 blocks, on pictures of one's own.

CAME at 1e-5 without the batch rule, warm-up 100, an average of 0.999: ours, no official recipe
fine-tunes; the rest is configs/sigma.py's. States of "" for dropped captions, as released. Pictures
are encoded once, text too: that is what makes it fast. Expected: the style of the data within 1,000
to 3,000 steps; one 80 GB device holds XL/2 at 1024 px and batch 16 in bfloat16.

Data: any source of docs/data_sources.md. --base, such as terminusresearch/pixart-900m-1024-ft-v0.6
of 42 blocks, reads sizes, prediction and VAE of another model.
    python train.py configs/sigma_finetune.py --workdir runs/mine --stages.0.data.source folder:DIR
"""

from __future__ import annotations

import dataclasses

from configs import sigma
from pixart_jax.config import Config, DataConfig

MODEL = "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"


def get_config() -> Config:
    stage = sigma.stage("finetune", 1024, 2_000, 16, lr=1e-5, warmup=100, start=MODEL)
    data = DataConfig(
        "folder:data/pictures",
        captions=(("caption", 1.0),),
        buckets=stage.data.buckets,
        max_text_tokens=300,
    )
    optimizer = dataclasses.replace(stage.optimizer, sqrt_scale_from=None, ema=0.999)
    stage = dataclasses.replace(stage, data=data, optimizer=optimizer, model=None)
    config = sigma.run("sigma_finetune", dataclasses.replace(stage, model=sigma.model(1024)))
    preview = dataclasses.replace(config.preview, every=500)
    return dataclasses.replace(
        config,
        stages=(stage,),
        vae=MODEL,
        text_encoder=MODEL,
        preview=preview,
        checkpoint_every=500,
    )

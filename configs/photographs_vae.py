"""An autoencoder for docs/data.md's photographs: that of the embedded world (assets/shapes),
trained on for a minute or two.

A real run rests on Stable Diffusion's VAE, which is not to be had without a network; this one gives
photographs their colours and rough shapes back. Expected: 21 dB on crops of the photographs that it
was trained on, from 18.
    python train.py configs/photographs_vae.py --workdir runs/photographs_vae
"""

from __future__ import annotations

import dataclasses

from configs import shapes_vae
from pixart_jax.config import Config, DataConfig, PreviewConfig


def get_config(steps: int = 150) -> Config:
    recipe = shapes_vae.get_config()
    stage = shapes_vae.stage("photographs", "assets/shapes", steps, 2e-3, kl_weight=1e-4)
    optimizer = dataclasses.replace(
        stage.optimizer, final_fraction=0.0, warmup_steps=20, weight_decay=0.0, ema=0.98
    )
    data = DataConfig("webdataset:data/photographs/web", buckets=((64, 64),))
    stage = dataclasses.replace(stage, batch_size=16, data=data, optimizer=optimizer)
    return dataclasses.replace(
        recipe,
        name="photographs_vae",
        stages=(stage,),
        checkpoint_every=250,
        preview=PreviewConfig(),
    )

"""An autoencoder for docs/data.md's photographs: that of the embedded world (assets/shapes),
trained on for a minute or two.

A real run rests on Stable Diffusion's VAE, which is not to be had without a network; this one gives
photographs their colours and rough shapes back. Expected: 21 dB on crops of the photographs that it
was trained on, from 18.
    python train.py configs/photographs_vae.py --workdir runs/photographs_vae
"""

from __future__ import annotations

from pixart_jax.config import AutoencoderConfig, Config, DataConfig, OptimizerConfig, StageConfig
from pixart_jax.models.transformer import TransformerConfig
from pixart_jax.models.vae import VAEConfig


def get_config(steps: int = 150) -> Config:
    return Config(
        name="photographs_vae",
        stages=(
            StageConfig(
                name="photographs",
                task="autoencoder",
                steps=steps,
                batch_size=16,
                data=DataConfig("webdataset:data/photographs/web", buckets=((64, 64),)),
                autoencoder=AutoencoderConfig(l1_weight=1.0, l2_weight=1.0, kl_weight=1e-4),
                optimizer=OptimizerConfig(
                    learning_rate=2e-3,
                    schedule="cosine",
                    warmup_steps=20,
                    weight_decay=0.0,
                    b2=0.99,
                    eps=1e-8,
                    clip=1.0,
                    ema=0.98,
                ),
                start="assets/shapes",
            ),
        ),
        model=TransformerConfig(patch_size=2),
        vae=None,
        vae_model=VAEConfig(
            block_out_channels=(16, 16, 32, 64),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=64,
        ),
        text_encoder=None,
        compute_dtype="float32",
        log_every=50,
        checkpoint_every=250,
    )

"""The small autoencoder behind the shipped model: f8, 4 latent channels, in Stable Diffusion's
form.

Trained on the gallery of all levels of the embedded world at 64 and 96 px.
    python train.py configs/shapes_vae.py --workdir runs/shapes_vae
"""

from pixart_jax.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
)
from pixart_jax.models.configs import TransformerConfig, VAEConfig


def stage(name: str, start: str, steps: int, learning_rate: float, kl_weight: float) -> StageConfig:
    return StageConfig(
        name=name,
        task="autoencoder",
        start=start,
        steps=steps,
        batch_size=8,
        data=DataConfig(source="tfds:shapes/gallery", buckets=((64, 64), (96, 96))),
        autoencoder=AutoencoderConfig(l1_weight=1.0, l2_weight=1.0, kl_weight=kl_weight),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate,
            schedule="cosine",
            final_fraction=0.01,
            warmup_steps=100,
            weight_decay=1e-4,
            b2=0.99,
            eps=1e-8,
            clip=1.0,
            ema=0.998,
        ),
    )


def get_config() -> Config:
    return Config(
        name="shapes_vae",
        model=TransformerConfig(patch_size=2),
        vae=None,
        text_encoder=None,
        vae_model=VAEConfig(
            block_out_channels=(16, 16, 32, 64),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=64,
        ),
        compute_dtype="float32",
        stages=(
            stage("coarse", "fresh", steps=7000, learning_rate=2e-3, kl_weight=1e-3),
            stage("fine", "previous", steps=5000, learning_rate=1.5e-3, kl_weight=5e-4),
        ),
        log_every=50,
        checkpoint_every=1000,
        preview=PreviewConfig(every=1000),
    )

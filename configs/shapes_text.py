"""The small T5 v1.1 encoder behind the shipped model, and its tokenizer of whole words.

Learns captions of all levels of the embedded world by masked tokens: in a dense caption an attribute stands twice, so that
telling a hidden one needs the noun that it belongs to.
    python train.py configs/shapes_text.py --workdir runs/shapes_text
"""

from pixart_jax.config import Config, DataConfig, MaskedTextConfig, OptimizerConfig, StageConfig
from pixart_jax.models.t5 import T5Config


def get_config() -> Config:
    return Config(
        name="shapes_text",
        vae=None,
        text_encoder=None,
        text_model=T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=192, num_layers=3, num_heads=4),
        compute_dtype="float32",
        stages=(
            StageConfig(
                name="masked_text",
                task="masked_text",
                start="fresh",
                steps=2500,
                batch_size=32,
                data=DataConfig(source="tfds:shapes/gallery", captions=(("dense", 0.75), ("short", 0.25)), max_text_tokens=80),
                masked_text=MaskedTextConfig(rate=0.25),
                optimizer=OptimizerConfig(
                    learning_rate=2e-3,
                    schedule="cosine",
                    final_fraction=0.01,
                    warmup_steps=100,
                    weight_decay=0.01,
                    b2=0.98,
                    eps=1e-8,
                    clip=1.0,
                    ema=0.995,
                ),
            ),
        ),
        log_every=100,
        checkpoint_every=2000,
    )

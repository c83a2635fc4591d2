"""The small T5 v1.1 encoder behind the shipped model, and its tokenizer of whole words.

Learns to read the captions of all levels of the embedded world: from a brief or a short one a
decoder of one layer writes the dense one, which says of each object its colour, its size and its
place. Six minutes on two CPU cores.
    python train.py configs/shapes_text.py --workdir runs/shapes_text
"""

from pixart_jax.config import Config, DataConfig, OptimizerConfig, StageConfig, TextToTextConfig
from pixart_jax.models.configs import T5Config

CAPTIONS = (("brief", 0.2), ("short", 0.45), ("shapeless", 0.05), ("dense", 0.3))
IDENTIFIERS = ("sks", "zwx", "ohx", "vqp")  # for what an adapter will learn


def get_config() -> Config:
    return Config(
        name="shapes_text",
        vae=None,
        text_encoder=None,
        text_model=T5Config(
            vocab_size=128, d_model=64, d_kv=16, d_ff=192, num_layers=3, num_heads=4
        ),
        compute_dtype="float32",
        stages=(
            StageConfig(
                name="text_to_text",
                task="text_to_text",
                start="fresh",
                steps=4000,
                batch_size=32,
                data=DataConfig(
                    source="tfds:shapes/gallery", captions=CAPTIONS, max_text_tokens=80
                ),
                text_to_text=TextToTextConfig(target="dense", hidden=0.2, spare_words=IDENTIFIERS),
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

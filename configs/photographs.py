"""The real recipes' three stages, shrunk to what two CPU cores train in minutes, on real
photographs in the real data's forms.

Each stage is that of its xl2_* recipe (xl2_256_imagenet, xl2_256_sam, xl2_1024_ms) with fewer
steps, smaller pictures and a faster optimizer, and velocity in place of epsilon, which a small
model learns in fewer steps: the tasks, the learned range, the size conditions and the position
scales are theirs. docs/data.md makes the data and runs it. Expected: blots in the photographs'
colours; 500 steps on 240 pictures do not teach 0.6M parameters which photograph a caption means.
    python train.py configs/photographs.py --workdir runs/photographs
"""

from __future__ import annotations

import dataclasses

from configs import xl2_256_imagenet, xl2_256_sam, xl2_1024_ms
from pixart_jax.config import Config, DataConfig, PreviewConfig, StageConfig
from pixart_jax.models.configs import TransformerConfig

DATA = "data/photographs"
PROMPTS = (
    "a ginger cat",
    "portrait of an astronaut",
    "a red flower",
    "surface of the moon",
    "cup of coffee on a table",
    "grass",
)


def shrunk(recipe, steps: int, folder: str, captions, buckets, **changes) -> StageConfig:
    """The one stage of a recipe, for a small model and the data in a folder of ``DATA``."""
    (stage,) = recipe.get_config().stages
    return dataclasses.replace(
        stage,
        steps=steps,
        batch_size=16,
        position_base=4,
        data=DataConfig(f"{DATA}/{folder}", captions=captions, buckets=buckets),
        objective=dataclasses.replace(stage.objective, prediction="v"),
        optimizer=dataclasses.replace(
            stage.optimizer,
            learning_rate=1.5e-3,
            warmup_steps=min(50, steps // 4),
            clip=1.0,
            ema=0.99,
        ),
        **changes,
    )


def get_config(
    imagenet_steps: int = 100, sam_steps: int = 100, aesthetic_steps: int = 300
) -> Config:
    square, sizes = ((64, 64),), ((96, 96), (80, 112), (112, 80), (64, 128), (128, 64))
    plain, mixed = (("caption", 1.0),), (("caption", 0.5), ("dense", 0.5))
    labels = DataConfig().captions  # of no use to a class-conditional stage
    previous = {"start": "previous"}
    return Config(
        name="photographs",
        stages=(
            shrunk(xl2_256_imagenet, imagenet_steps, "imagenet_64", labels, square),
            shrunk(xl2_256_sam, sam_steps, "sam_64", plain, square, **previous),
            shrunk(xl2_1024_ms, aesthetic_steps, "web_96", mixed, sizes, **previous),
        ),
        model=TransformerConfig(
            depth=3,
            width=96,
            heads=4,
            patch_size=2,
            sample_size=12,
            caption_width=64,
            text_tokens=120,
            size_conditions=True,
        ),
        vae="data/photographs/encoders",
        text_encoder="data/photographs/encoders",
        compute_dtype="float32",
        log_every=20,
        checkpoint_every=100,
        preview=PreviewConfig(prompts=PROMPTS, steps=20, guidance=3.0),
    )

"""What the five XL/2 recipes share: the paper's optimizer and objective, the model, the frozen
parts and the mesh. A recipe is its differences from this.
"""

from __future__ import annotations

from pixart_jax.config import (
    Config,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
)
from pixart_jax.models.configs import TransformerConfig

PROMPTS = (
    "a small cactus with a happy face in the desert",
    "a lighthouse on a cliff at dusk, waves below, oil painting",
    "three red apples on a white plate beside a blue cup",
    "an old bicycle leaning on a yellow wall",
)

OPTIMIZER = OptimizerConfig(
    name="adamw",
    learning_rate=2e-5,
    weight_decay=0.03,
    b1=0.9,
    b2=0.999,
    eps=1e-10,
    schedule="constant",
    warmup_steps=1000,
    clip=0.01,
    ema=0.9999,
)


def stage(name: str, **fields) -> StageConfig:
    """A stage with the paper's optimizer and objective. fields: of StageConfig."""
    objective = ObjectiveConfig(prediction="epsilon", learned_range=True, condition_dropout=0.1)
    return StageConfig(name=name, optimizer=OPTIMIZER, objective=objective, **fields)


def run(stage: StageConfig, *, latent_size: int, size_conditions: bool = False, **fields) -> Config:
    """The recipe of one stage. latent_size: side of the square latents, an eighth of the image's.
    fields: of Config."""
    defaults = {
        "text_encoder": "models/t5-v1_1-xxl",
        "preview": PreviewConfig(every=5000, prompts=PROMPTS),
    }
    return Config(
        name=f"xl2_{stage.name}",
        stages=(stage,),
        model=TransformerConfig.preset(
            "XL/2", sample_size=latent_size, size_conditions=size_conditions
        ),
        vae="models/sd-vae-ft-ema",
        mesh=MeshConfig(data=1, fsdp=-1),
        compute_dtype="bfloat16",
        remat="auto",
        checkpoint_every=2000,
        **{**defaults, **fields},
    )

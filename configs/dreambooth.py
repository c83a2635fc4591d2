"""DreamBooth: teach a model a subject from a folder of 3 to 6 pictures (arXiv 2208.12242).

As it stands it takes the shipped shapes model, so that it runs on a CPU in minutes; --base names
another model's folder or hub id. All weights are trained, or with --lora.rank 4 an adapter alone,
for which a learning rate of 1e-4 to 1e-3 does. With --dreambooth.class-prompt the model's own
pictures of the class are trained on beside the subject's (prior preservation).
Expected: the subject in new places after 400 steps. The average looks back over 40 steps: one of
0.9999, as in pretraining, would hardly move.
    python train.py configs/dreambooth.py --workdir runs/heart --stages.0.data.source folder:DIR
"""

from __future__ import annotations

from configs import shapes
from pixart_jax.config import (
    Config,
    DataConfig,
    DreamBoothConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
)

STEPS = 400


def get_config() -> Config:
    stage = StageConfig(
        name="dreambooth",
        steps=STEPS,
        batch_size=4,
        start="assets/shapes",
        data=DataConfig(
            source="folder:data/subject", captions=(("caption", 1.0),), max_text_tokens=64
        ),
        dreambooth=DreamBoothConfig(prompt="a heart", identifier="heart"),
        objective=ObjectiveConfig(prediction="v", null_condition="empty", condition_dropout=0.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            warmup_steps=0,
            weight_decay=0.01,
            eps=1e-8,
            clip=1.0,
            ema=1 - 10 / STEPS,
        ),
    )
    return Config(
        name="dreambooth",
        model=shapes.get_config().model,
        stages=(stage,),
        compute_dtype="float32",
        log_every=10,
        checkpoint_every=100,
        preview=PreviewConfig(every=100),
    )

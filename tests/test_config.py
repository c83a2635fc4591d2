"""Options are checked where they are built: the field, its value, and what would do."""

from __future__ import annotations

import pytest

from pixart_jax.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    GuardConfig,
    HardwareConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
    TextToTextConfig,
)
from pixart_jax.errors import UserError

STAGE, HALVED = StageConfig("a"), OptimizerConfig(accumulate=2)
ODD = StageConfig("a", data=DataConfig(buckets=((64, 72),)))


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (MeshConfig, {"fsdp": 0}, "MeshConfig.fsdp = 0"),
        (OptimizerConfig, {"name": "adam"}, "did you mean 'adamw'"),
        (OptimizerConfig, {"learning_rate": 0.0}, "must be positive"),
        (OptimizerConfig, {"b2": 1.0}, r"OptimizerConfig.b2 = 1.0: must lie in \[0, 1\)"),
        (OptimizerConfig, {"clip": -1.0}, "None for no clipping"),
        (ObjectiveConfig, {"prediction": "velocity"}, "ObjectiveConfig.prediction"),
        (ObjectiveConfig, {"beta_start": 0.5}, "beta_end = 0.02"),
        (AutoencoderConfig, {"kl_weight": -1.0}, "must not be negative"),
        (TextToTextConfig, {"hidden": 1.0}, "hidden = 1.0"),
        (TextToTextConfig, {"spare_words": ("sks", "Zwx")}, "letters a to z"),
        (DataConfig, {"buckets": ()}, "at least one"),
        (DataConfig, {"buckets": ((0, 64),)}, "must be positive"),
        (DataConfig, {"captions": (("dense", 0.0),)}, "all 0"),
        (PreviewConfig, {"steps": 0}, "at least 1"),
        (GuardConfig, {"spike_factor": 1.0}, "GuardConfig.spike_factor = 1.0: must be above 1"),
        (GuardConfig, {"bad_steps_in_row": 0}, "bad_steps_in_row = 0"),
        (HardwareConfig, {"watts_per_device": -1.0}, "must not be negative"),
        (StageConfig, {"name": "a/b"}, "files bear it"),
        (StageConfig, {"name": "a", "task": "text-to-image"}, "did you mean 'text_to_image'"),
        (StageConfig, {"name": "a", "steps": -1}, "must not be negative"),
        (
            StageConfig,
            {"name": "a", "batch_size": 9, "optimizer": HALVED},
            "multiple of optimizer.accumulate = 2",
        ),
        (Config, {"name": "c", "stages": ()}, "at least one stage"),
        (Config, {"name": "c", "stages": (STAGE, STAGE)}, "must differ"),
        (Config, {"name": "c", "stages": (ODD,)}, "64×72 is not divisible by 16"),
        (Config, {"name": "c", "stages": (STAGE,), "log_every": 0}, "at least 1"),
    ],
)
def test_a_bad_value_is_one_clear_line(kind, options, said):
    with pytest.raises(UserError, match=said) as error:
        kind(**options)
    assert "\n" not in str(error.value)


def test_limits_that_are_not_set_are_accepted():
    TextToTextConfig(hidden=0.0, decoder_layers=2)
    OptimizerConfig(clip=None, sqrt_scale_from=None)
    Config("c", (STAGE,), keep_every=None, guard=GuardConfig(spike_factor=None))

"""Options are checked where they are built: the field, its value, and what would do."""

from __future__ import annotations

import pytest

from pixart_jax.config import (
    AutoencoderConfig,
    Config,
    DataConfig,
    HardwareConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PreviewConfig,
    StageConfig,
    TextToTextConfig,
)
from pixart_jax.errors import UserError


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
        (DataConfig, {"buckets": ()}, "at least one"),
        (DataConfig, {"buckets": ((0, 64),)}, "must be positive"),
        (DataConfig, {"captions": (("dense", 0.0),)}, "all 0"),
        (PreviewConfig, {"steps": 0}, "at least 1"),
        (HardwareConfig, {"watts_per_device": -1.0}, "must not be negative"),
        (StageConfig, {"name": "a/b"}, "files bear it"),
        (StageConfig, {"name": "a", "task": "text-to-image"}, "did you mean 'text_to_image'"),
        (StageConfig, {"name": "a", "steps": -1}, "must not be negative"),
        (
            StageConfig,
            {"name": "a", "batch_size": 9, "optimizer": OptimizerConfig(accumulate=2)},
            "multiple of optimizer.accumulate = 2",
        ),
        (Config, {"name": "c", "stages": ()}, "at least one stage"),
        (Config, {"name": "c", "stages": (StageConfig("a"), StageConfig("a"))}, "must differ"),
        (
            Config,
            {"name": "c", "stages": (StageConfig("a", data=DataConfig(buckets=((64, 72),))),)},
            "64×72 is not divisible by 16",
        ),
        (Config, {"name": "c", "stages": (StageConfig("a"),), "log_every": 0}, "at least 1"),
    ],
)
def test_a_bad_value_is_one_clear_line(kind, options, said):
    with pytest.raises(UserError, match=said) as fault:
        kind(**options)
    assert "\n" not in str(fault.value)


def test_shares_that_add_up_to_one_are_fine():
    TextToTextConfig(hidden=0.0, decoder_layers=2)

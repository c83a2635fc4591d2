"""Whether a run's models and batches fit its mesh: found out from the config, before anything is
opened or compiled."""

from __future__ import annotations

from pixart_jax.config import Config, StageConfig
from pixart_jax.models.remat import check_platform
from pixart_jax.parallel.mesh import check_divides


def check_models(config: Config, mesh) -> None:
    """UserError where tensor does not divide a stage's heads or MLP, context its image tokens, or
    the platform lacks what remat needs."""
    check_platform(config.remat, mesh.devices.flat[0].platform)
    for stage in config.stages:
        if stage.task in ("class_conditional", "text_to_image"):
            model = config.model
            check_divides(
                mesh,
                f"stage {stage.name}",
                heads=model.heads,
                mlp_width=model.mlp_width,
                tokens=_tokens(config, stage),
            )
        elif stage.task == "text_to_text" and config.text_model is not None:
            check_divides(
                mesh,
                f"stage {stage.name}",
                heads=config.text_model.num_heads,
                mlp_width=config.text_model.d_ff,
            )


def _tokens(config: Config, stage: StageConfig) -> dict[str, int]:
    """Image tokens of each bucket, by its size in pixels. A latent is 8 pixels a side, as
    everywhere in the config."""
    side = 8 * config.model.patch_size
    return {
        f"bucket {height}×{width}": (height // side) * (width // side)
        for height, width in stage.data.buckets
    }

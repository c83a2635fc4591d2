"""What several of these tests open."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def saved_transformer(tmp_path_factory):
    """The folder of a transformer of a few thousand random numbers, as diffusers saves it; not to
    be written to."""
    from diffusers import PixArtTransformer2DModel

    folder = tmp_path_factory.mktemp("saved") / "transformer"
    PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=12,
        sample_size=8,
        cross_attention_dim=24,
        caption_channels=10,
    ).save_pretrained(folder)
    return folder

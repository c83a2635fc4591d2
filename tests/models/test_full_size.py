"""XL/2 at its real size beside diffusers, with the same random weights."""

from __future__ import annotations

import gc

import jax
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel

from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.weights.streaming import read
from pixart_jax.weights.transformer import DIFFUSERS, config_from_json
from tests.models.pixart_reference import (
    inputs,
    randomise,
    relative_error,
    run_diffusers,
    transformer_shapes,
)

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.slow
def test_xl_2_equals_diffusers_at_256_and_512_px(whole_memory):
    with torch.device("meta"):  # their own init would take longer than the forward pass
        theirs = PixArtTransformer2DModel(
            sample_size=64, caption_channels=4096, use_additional_conditions=False
        )
    position = theirs.pos_embed
    theirs = theirs.to_empty(device="cpu")
    theirs.pos_embed = type(position)(  # its table is a buffer, computed at init
        height=64, width=64, patch_size=2, in_channels=4, embed_dim=1152, interpolation_scale=1
    )
    randomise(theirs)
    config = config_from_json(theirs.config)
    cases = [
        inputs(config, height, width, [20], seed)
        for seed, (height, width) in enumerate([(32, 32), (64, 64)])
    ]
    references = [run_diffusers(theirs, **args) for args in cases]

    state = theirs.state_dict()
    del theirs
    params = read(
        DIFFUSERS,
        transformer_shapes(config),
        {key: value.numpy() for key, value in state.items()},
        source="diffusers",
    )
    state.clear()
    gc.collect()
    apply = jax.jit(PixArtTransformer(config).apply)
    for args, reference in zip(cases, references):
        error = relative_error(apply({"params": params}, **args), reference)
        print(f"{8 * args['latents'].shape[1]} px: {error:.2e}")
        assert error <= 1e-4
        assert np.abs(reference).max() > 0.1

"""The transformer made from a DiT: exact at t = 500 without a class, and the best that one shared
network can be elsewhere."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, TransformerConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.training.reparameterization import from_dit, reparameterization_error
from pixart_jax.weights import component
from pixart_jax.weights.table import flatten
from tests.models.reference import random_params, relative_error, transformer_shapes

GEOMETRY = {"depth": 4, "width": 48, "heads": 4, "sample_size": 8}
DIT = DiTConfig(**GEOMETRY, num_classes=6)
PIXART = TransformerConfig(**GEOMETRY, caption_width=20, text_tokens=9)


@pytest.fixture(scope="module")
def dit_params() -> dict:
    """Every weight random, none zero."""
    return random_params(component.DiT, DIT, 0.8 / DIT.width**0.5)


def draw(b: int = 2):
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(b, 8, 6, 4)).astype(np.float32)
    return latents, rng.normal(size=(b, 5, 20)).astype(np.float32), np.array([5, 2][:b])


@pytest.mark.parametrize("conditions", [False, True], ids=["plain", "multi-scale"])
def test_equals_the_class_free_dit_at_500_for_any_text(dit_params, conditions):
    config = dataclasses.replace(PIXART, size_conditions=conditions)
    params = from_dit(dit_params, DIT, config, jax.random.key(0))
    shapes = transformer_shapes(config)
    assert jax.tree.map(np.shape, flatten(params)) == jax.tree.map(np.shape, flatten(shapes))
    latents, text, lengths = draw()
    t = np.full((2,), 500.0, np.float32)
    size = (np.array([[64.0, 32.0], [1024.0, 512.0]]), np.array([2.0, 2.0])) if conditions else ()
    transformer = jax.jit(PixArtTransformer(config).apply)
    ours = transformer({"params": params}, latents, t, text, lengths, *size)
    dit = jax.jit(DiT(DIT).apply)
    theirs = dit({"params": dit_params}, latents, t, np.array([6, 6]))
    assert relative_error(ours, theirs) <= 1e-5
    with_class = dit({"params": dit_params}, latents, t, np.array([0, 3]))
    assert relative_error(ours, with_class) > 1e-2, "a class would show: the test can fail"


def test_shared_network_is_the_least_squares_fit_over_all_timesteps(dit_params):
    """Against a general solver that knows nothing of the algebra: minimise over W the error with
    tables exact at t = 500."""
    params = from_dit(dit_params, DIT, PIXART, jax.random.key(0))
    module, t = PixArtTransformer(PIXART), jnp.arange(1000.0)
    # φ(t) from the model itself, rows 0 … 999, and the features that the error depends on.
    embed = module.apply({"params": params}, t, None, None, method="_condition")
    phi = np.asarray(jax.nn.silu(embed), np.float64)
    features = phi - phi[500]  # [1000, d]
    kernels = np.asarray(dit_params["blocks"]["modulation"]["kernel"], np.float64)
    own = features @ kernels  # [depth, 1000, 6d]
    repeated = np.tile(features, (DIT.depth, 1))
    best = np.linalg.lstsq(repeated, own.reshape(-1, own.shape[-1]), rcond=None)[0]
    chosen = np.asarray(params["t_block"]["kernel"], np.float64)

    def residual(w):
        return np.square(features @ w - own).sum()

    assert residual(chosen) == pytest.approx(residual(best), rel=1e-6)
    assert residual(chosen) < 0.95 * residual(kernels[0]), "better than one block's own"


def test_what_a_dit_lacks_is_fresh_and_cross_attention_starts_at_zero(dit_params):
    one, two = (from_dit(dit_params, DIT, PIXART, jax.random.key(seed)) for seed in (0, 1))
    assert not np.any(one["blocks"]["cross_attn"]["out"]["kernel"])
    pairs = {path: (value, flatten(two)[path]) for path, value in flatten(one).items()}
    drawn = {path for path, pair in pairs.items() if not np.array_equal(*pair)}
    fresh = {f"caption_projection/fc{i}/kernel" for i in (1, 2)} | {"null_caption"}
    assert drawn == fresh | {f"blocks/cross_attn/{x}/kernel" for x in "qkv"}


def test_error_over_the_other_timesteps_is_reported(dit_params):
    params = from_dit(dit_params, DIT, PIXART, jax.random.key(0))
    report = reparameterization_error(
        dit_params, DIT, params, PIXART, draw()[0], timesteps=(0, 250, 500, 999)
    )
    assert report.blocks.shape == (4, 4) and report.output.shape == report.final.shape == (4,)
    at, elsewhere = 2, [0, 1, 3]
    assert max(report.blocks[:, at].max(), report.final[at]) <= 1e-6
    assert report.output[at] <= 1e-5
    assert (report.output[elsewhere] > 1e-3).all(), "random blocks differ, and the report says so"
    assert report.summary()["output_at_500"] == report.output[at]


def test_blocks_that_modulate_alike_lose_nothing_in_the_blocks(dit_params):
    """If every block's network is one shared matrix plus its own offset, PixArt's blocks can be
    exact at every t."""
    alike = jax.tree.map(np.copy, dit_params)
    kernel = alike["blocks"]["modulation"]["kernel"]
    kernel[:] = kernel[0]
    params = from_dit(alike, DIT, PIXART, jax.random.key(0))
    report = reparameterization_error(
        alike, DIT, params, PIXART, draw()[0], timesteps=(0, 250, 999)
    )
    assert report.blocks.max() <= 1e-6


def test_geometries_that_differ_are_refused():
    with pytest.raises(UserError, match="depth = 4 .* depth = 5"):
        from_dit({}, DIT, TransformerConfig(**{**GEOMETRY, "depth": 5}), jax.random.key(0))

"""The autoencoder against diffusers' AutoencoderKL, with the same weights; tiled decoding against
one pass."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchVAE

from pixart_jax.errors import UserError
from pixart_jax.models.configs import VAEConfig
from pixart_jax.models.vae import AutoencoderKL, tile_starts, tiled_decode
from pixart_jax.weights import vae as tables
from pixart_jax.weights.component import VAE
from pixart_jax.weights.table import flatten, write
from tests.models.reference import (
    param_shapes,
    random_params,
    randomise,
    read_state_dict,
    relative_error,
)

SIZES = {
    "tiny": VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4),
    "f8": VAEConfig(block_out_channels=(8, 16, 16, 24), layers_per_block=1, norm_num_groups=8),
    "without quant convolutions and attention": VAEConfig(
        3, 3, (8, 12, 16), 2, norm_num_groups=2, use_quant_conv=False, mid_block_attention=False
    ),
}


def reference(config: VAEConfig) -> TorchVAE:
    fields = tables.config_to_json(config).items()
    model = TorchVAE(**{name: value for name, value in fields if not name.startswith("_")})
    return randomise(model, spread=0.2, centre=0.7)


def params_of(config: VAEConfig, model: TorchVAE) -> dict:
    shapes = param_shapes(VAE, config)
    params = read_state_dict(tables.table(config, {})[0], shapes, model.state_dict())
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(params))
    return params


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(config: VAEConfig, method: str, params: dict, *arguments):
    return AutoencoderKL(config).apply({"params": params}, *arguments, method=method)


@functools.partial(jax.jit, static_argnums=0)
def fresh(config: VAEConfig, key: jax.Array) -> dict:
    return nn.unbox(AutoencoderKL(config).init(key, *VAE._example(config)))["params"]


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return tensor.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    "size, height, width", [("f8", 33, 19), *((size, 16, 24) for size in SIZES)]
)
def test_encode_and_decode_equal_diffusers(size, height, width):
    config, rng = SIZES[size], np.random.default_rng(0)
    model = reference(config)
    params = params_of(config, model)
    images = rng.uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
        decoded = model.decode(posterior.mean).sample
    mean, std = run(config, "encode", params, images)
    f = config.factor
    assert mean.shape == (2, height // f, width // f, config.latent_channels)
    assert relative_error(mean, channels_last(posterior.mean)) <= 1e-4
    assert relative_error(std, channels_last(posterior.std)) <= 1e-4
    ours = run(config, "decode", params, channels_last(posterior.mean))
    assert relative_error(ours, channels_last(decoded)) <= 1e-4


def test_log_variance_is_clamped():
    config, images = SIZES["tiny"], jnp.zeros((1, 8, 8, 3))
    params = random_params(VAE, config)
    for shift, bound in ((100.0, 20.0), (-100.0, -30.0)):
        params["quant"]["bias"] = jnp.full_like(params["quant"]["bias"], shift)
        _, log_variance = run(config, "moments", params, images)
        _, std = run(config, "encode", params, images)
        np.testing.assert_allclose(log_variance, bound)
        np.testing.assert_allclose(std, np.exp(bound / 2), rtol=1e-5)


def test_every_parameter_gets_a_gradient_and_a_few_steps_lower_the_loss():
    config = SIZES["tiny"]
    module = AutoencoderKL(config)
    images = jax.random.uniform(jax.random.key(0), (4, 4, 4, 3), minval=-1)
    images = jax.image.resize(images, (4, 16, 16, 3), "linear")
    params = fresh(config, jax.random.key(1))

    @jax.jit
    def step(params, key):
        def loss(params):
            reconstruction, mean, log_variance = module.apply({"params": params}, images, key)
            kl = jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1)
            return jnp.mean(jnp.square(reconstruction - images)) + 1e-4 * kl

        value, gradient = jax.value_and_grad(loss)(params)
        return value, gradient, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

    first, gradient, params = step(params, jax.random.key(2))
    # A key's bias shifts all logits of a query alike, so softmax takes it out.
    silent = [
        path
        for path, leaf in flatten(gradient).items()
        if np.abs(leaf).max() < 1e-9 and not path.endswith("attention/key/bias")
    ]
    assert not silent
    for i in range(30):
        last, _, params = step(params, jax.random.key(3 + i))
    assert last < 0.8 * first


def test_parameters_of_stable_diffusions_vae():
    leaves = jax.tree.leaves(param_shapes(VAE, VAEConfig()))
    assert sum(leaf.size for leaf in leaves) == 83_653_863


def test_names_are_written_back_as_they_were_read():
    config = SIZES["f8"]
    model = reference(config)
    written = write(tables.table(config, {})[0], params_of(config, model))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert set(written) == set(state)
    for name, array in written.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


# ---- tiles ----


def test_tiles_of_a_local_function_equal_one_pass_everywhere():
    """With a decoder that looks at one cell only, the blend must add nothing: weights sum to one at
    every pixel."""

    def decode(latents):
        return latents[..., :3].repeat(8, axis=1).repeat(8, axis=2)

    latents = jax.random.normal(jax.random.key(0), (2, 21, 34, 4))
    for tile, overlap in ((8, 4), (8, 0), (16, 5), (30, 8)):
        np.testing.assert_allclose(
            tiled_decode(decode, latents, tile, overlap), decode(latents), atol=1e-5
        )


def test_tiled_decode_is_close_to_one_pass_in_the_interior():
    """A decoder without attention; group norms see a tile instead of the image, which is what is
    left of a difference.

    The worst case: latents are white noise, a group has 2 channels and a tile 32 × 32 cells (0.065
    rms here).
    """
    config = VAEConfig(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_attention=False
    )
    decode = functools.partial(run, config, "decode", fresh(config, jax.random.key(0)))
    latents = jax.random.normal(jax.random.key(1), (1, 64, 96, 4))
    whole = np.asarray(decode(latents))
    tiled = np.asarray(tiled_decode(decode, latents, tile=32, overlap=8))
    assert tiled.shape == whole.shape
    error = (tiled - whole)[:, 16:-16, 16:-16]
    assert np.sqrt(np.mean(error**2)) / whole.std() < 0.10
    assert np.abs(error).max() / whole.std() < 0.60


def test_latents_no_larger_than_a_tile_take_one_pass():
    calls = []
    latents = jnp.ones((1, 16, 16, 4))
    result = tiled_decode(lambda part: calls.append(part.shape) or part, latents, 16, 4)
    assert calls == [(1, 16, 16, 4)] and result.shape == (1, 16, 16, 4)


def test_tiles_have_one_shape_and_cover_the_side():
    for side, tile, overlap in ((128, 64, 16), (129, 64, 16), (65, 64, 16), (200, 33, 7)):
        starts = tile_starts(side, tile, overlap)
        assert starts[0] == 0 and starts[-1] == side - tile
        assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:]))


# ---- bad input ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_out_channels": (8, 10), "norm_num_groups": 4}, "not divisible by norm_num_groups"),
        ({"block_out_channels": ()}, "is empty"),
        ({"latent_channels": 0}, "VAEConfig.latent_channels = 0"),
        ({"scaling_factor": 0.0}, "VAEConfig.scaling_factor = 0.0"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        VAEConfig(**options)


def test_shapes_that_do_not_fit_are_named():
    for method, shape, says in (
        ("encode", (1, 16, 16, 4), r"images of shape \(1, 16, 16, 4\)"),
        ("encode", (1, 16, 7, 3), "too small: a side is at least 8"),
        ("decode", (1, 4, 4, 3), r"latents of shape \(1, 4, 4, 3\)"),
    ):
        with pytest.raises(UserError, match=says):
            AutoencoderKL(SIZES["f8"]).init(jax.random.key(0), jnp.zeros(shape), method=method)


@pytest.mark.parametrize("tile, overlap", [(8, 5), (8, -1), (0, 0)])
def test_tiles_that_cannot_be_are_named(tile, overlap):
    with pytest.raises(UserError, match=f"tile {tile} with overlap {overlap}"):
        tiled_decode(lambda latents: latents, jnp.ones((1, 16, 16, 4)), tile, overlap)

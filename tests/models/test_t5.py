"""The T5 encoder against transformers' T5EncoderModel, with the same weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config as TorchConfig
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from pixart_jax.errors import UserError
from pixart_jax.models.configs import T5Config
from pixart_jax.models.t5 import T5Encoder, relative_buckets
from pixart_jax.weights import t5 as tables
from pixart_jax.weights.component import TextEncoder
from pixart_jax.weights.table import write
from tests.models.reference import random_params, randomise, relative_error, t5_params, t5_shapes

SIZES = {
    "tiny": T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
    "inner wider than d_model": T5Config(97, 24, 16, 40, 3, 4, layer_norm_epsilon=1e-5),
    "other buckets": T5Config(64, 32, 4, 64, 1, 5, 12, 50),
}


def reference(config: T5Config) -> T5EncoderModel:
    model = T5EncoderModel(TorchConfig(**tables.config_to_json(config)))
    return randomise(model, spread=0.3, centre=1.0)


@functools.partial(jax.jit, static_argnums=0)
def run(module: T5Encoder, params: dict, ids, lengths):
    return module.apply({"params": params}, ids, lengths)


def params_of(config: T5Config, model: T5EncoderModel) -> dict:
    return t5_params(config, model.state_dict())


@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers_over_130_tokens_with_ragged_lengths(size):
    config = SIZES[size]
    model = reference(config)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (4, 139))
    lengths = np.array([139, 131, 7, 1])
    mask = np.arange(139) < lengths[:, None]
    with torch.no_grad():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(mask.astype(int)))
        theirs = out.last_hidden_state.numpy()
    ours = np.asarray(run(T5Encoder(config), params_of(config, model), ids, lengths))
    assert relative_error(ours[mask], theirs[mask]) <= 1e-4


def test_buckets_equal_transformers_for_every_distance():
    distance = torch.arange(400)[None, :] - torch.arange(400)[:, None]
    for buckets, limit in ((32, 128), (12, 50), (8, 20), (64, 300)):
        theirs = T5Attention._relative_position_bucket(distance, True, buckets, limit)
        np.testing.assert_array_equal(relative_buckets(400, buckets, limit), theirs.numpy())


def test_a_text_does_not_depend_on_its_padding_or_its_batch():
    config = SIZES["tiny"]
    module, params = T5Encoder(config), params_of(config, reference(config))
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (3, 20))
    long = run(module, params, ids, np.array([5, 20, 9]))
    short = run(module, params, ids[:1, :5], np.array([5]))
    np.testing.assert_allclose(long[:1, :5], short, atol=2e-6 * np.abs(short).max())


def test_names_are_written_back_as_they_were_read():
    config = SIZES["inner wider than d_model"]
    model = reference(config)
    written = write(tables.TRANSFORMERS, params_of(config, model))
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert set(state) - set(tables.IGNORED) == set(written)
    for name, array in written.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_every_parameter_learns_and_remat_changes_nothing():
    config = SIZES["tiny"]
    ids, lengths = np.arange(24).reshape(2, 12) % config.vocab_size, np.array([12, 8])
    params = random_params(TextEncoder, config)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(params, remat):
        states = run(T5Encoder(config, remat=remat), params, ids, lengths)
        return -jax.nn.log_softmax(states)[..., 3].mean()

    plain = gradient(params, "none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    for name in ("full", "dots"):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(gradient(params, name))):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16_stays_near_fp32():
    config = SIZES["tiny"]
    params = params_of(config, reference(config))
    ids, lengths = np.arange(40).reshape(2, 20), np.array([20, 13])
    exact = run(T5Encoder(config), params, ids, lengths)
    rounded = run(T5Encoder(config, dtype=jnp.bfloat16), params, ids, lengths)
    assert rounded.dtype == jnp.float32
    assert relative_error(rounded, exact) < 0.05


def test_parameters_of_t5_xxl():
    assert sum(leaf.size for leaf in jax.tree.leaves(t5_shapes(T5Config()))) == 4_762_310_656


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_model": 0}, "T5Config.d_model = 0"),
        ({"relative_attention_num_buckets": 6}, "multiple of 4"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance"),
    ],
)
def test_impossible_sizes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        T5Config(**options)


def test_shapes_that_do_not_fit_are_named():
    ids, lengths = jnp.zeros((2, 3), int), jnp.ones((1,), int)
    with pytest.raises(UserError, match=r"\(2, 3\) and lengths \(1,\)"):
        T5Encoder(SIZES["tiny"]).init(jax.random.key(0), ids, lengths)

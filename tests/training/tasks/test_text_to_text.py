"""A caption read, another written from its states, and the loss of writing it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.config import Config, StageConfig
from pixart_jax.models.configs import T5Config
from pixart_jax.models.t5 import T5Encoder
from pixart_jax.models.t5_decoder import T5Decoder
from pixart_jax.training.initialization import initial_params
from pixart_jax.training.tasks.text_to_text import TextToText
from pixart_jax.weights.component import TextEncoder
from tests.parameters import normal_params

CONFIG = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
# 11 words, the end mark, padding
IDS = jnp.tile(jnp.arange(10, 26)[None], (400, 1)).at[:, 11].set(1)


def task(hidden: float = 0.3) -> TextToText:
    return TextToText(T5Encoder(CONFIG), T5Decoder(CONFIG), hidden, hidden_token=2, tokenizer=None)


def batch(rows: int = 4, is_target: bool = False) -> dict:
    target = jax.random.randint(jax.random.key(7), (rows, 20), 3, 50)
    lengths = {"lengths": jnp.full((rows,), 12), "target_lengths": jnp.array([20, 13, 5, 1])[:rows]}
    ids = {"input_ids": IDS[:rows], "target_ids": target}
    return {**ids, **lengths, "is_target": jnp.full((rows,), is_target)}


def test_words_are_hidden_at_the_asked_rate_and_the_rest_is_left_alone():
    keys = jax.random.split(jax.random.key(0), len(IDS))
    shown = jax.vmap(task().mask_words)(IDS, jnp.full((len(IDS),), 12), keys)
    hidden = np.asarray(shown != IDS)
    # no end mark, no padding
    assert hidden[:, :11].mean() == pytest.approx(0.3, abs=0.03) and not hidden[:, 11:].any()
    assert (np.asarray(shown)[hidden] == 2).all()


def test_the_loss_is_the_cross_entropy_of_the_target_a_mean_over_each():
    t, b = task(), batch()
    params = normal_params(t.init)

    @jax.jit
    def run(params):
        states = t.module.apply({"params": params["encoder"]}, b["input_ids"], b["lengths"])
        inputs = params["encoder"]["embedding"], b["target_ids"], states, b["lengths"]
        found = t.losses(params, b, jax.random.split(jax.random.key(3), 4))
        return found, t.decoder.apply({"params": params["decoder"]}, *inputs)

    found, logits = run(params)
    logits = np.asarray(logits, np.float64)
    log_likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, length in enumerate(b["target_lengths"]):
        target = np.asarray(b["target_ids"][row, :length])
        likelihoods = log_likelihood[row, np.arange(length), target]
        right = logits[row, :length].argmax(-1) == target
        assert float(found["loss"][row]) == pytest.approx(-likelihoods.mean(), rel=1e-4)
        assert float(found["accuracy"][row]) == pytest.approx(right.mean())


def test_words_are_hidden_only_where_a_caption_is_its_own_target():
    t = task(hidden=0.9)
    params, losses = normal_params(t.init), jax.jit(t.losses)
    keys = [jax.random.split(jax.random.key(seed), 4) for seed in (3, 4)]
    clean, again = (losses(params, batch(), k)["loss"] for k in keys)
    np.testing.assert_array_equal(clean, again)
    one, other = (losses(params, batch(is_target=True), k)["loss"] for k in keys)
    assert (one != other).any() and (one != clean).any()


def test_every_parameter_learns():
    t = task()
    inputs = batch(is_target=True), jax.random.split(jax.random.key(3), 4)
    gradient = jax.jit(jax.grad(lambda p: t.losses(p, *inputs)["loss"].mean()))(
        normal_params(t.init)
    )
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_a_stage_starts_from_a_saved_encoder_with_a_fresh_decoder(tmp_path):
    t = task()
    encoder = normal_params(t.init)["encoder"]
    TextEncoder(CONFIG, encoder).save(tmp_path / "text_encoder")
    stage = StageConfig(name="more", task="text_to_text", start=str(tmp_path))

    def fresh():
        return normal_params(t.init, seed=1)

    config, key = Config(name="c", stages=(stage,)), jax.random.key(0)
    found = initial_params(config, 0, t, None, fresh, key, lambda *_: None)
    expected = {"encoder": encoder, "decoder": fresh()["decoder"]}
    jax.tree.map(np.testing.assert_array_equal, found, expected)

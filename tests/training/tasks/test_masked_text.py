"""Captions with words hidden, and the loss of naming them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.config import MaskedTextConfig
from pixart_jax.models.t5 import T5Config, T5Encoder
from pixart_jax.parallel.rules import unboxed
from pixart_jax.training.tasks.masked_text import MaskedText

CONFIG = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
IDS = jnp.tile(jnp.arange(10, 26)[None], (400, 1)).at[:, 11].set(1)  # 11 words, the end mark, padding


def task(**options) -> MaskedText:
    return MaskedText(T5Encoder(CONFIG), MaskedTextConfig(**options), None, mask_token=2, first_word=3, size=50)


def masked(**options):
    keys = jax.random.split(jax.random.key(0), len(IDS))
    return jax.vmap(task(**options).mask)(IDS, jnp.full((len(IDS),), 12), keys)


def test_words_are_hidden_at_the_asked_rates_and_the_rest_is_left_alone():
    shown, chosen = masked(rate=0.3, mask_share=0.8, random_share=0.1)
    assert chosen[:, :11].mean() == pytest.approx(0.3, abs=0.03)
    assert not chosen[:, 11:].any()  # neither the end mark nor padding
    np.testing.assert_array_equal(jnp.where(chosen, 0, shown), jnp.where(chosen, 0, IDS))
    hidden = np.asarray(shown)[np.asarray(chosen)]
    assert (hidden == 2).mean() == pytest.approx(0.8, abs=0.04)
    assert (np.asarray(shown == IDS)[np.asarray(chosen)]).mean() == pytest.approx(0.1, abs=0.03)
    assert hidden[hidden != 2].min() >= 3


def test_every_caption_hides_at_least_one_word():
    _, chosen = masked(rate=0.01)
    assert (chosen.sum(-1) >= 1).all()
    one_word = jax.vmap(task(rate=0.01).mask)(IDS[:8], jnp.full((8,), 2), jax.random.split(jax.random.key(1), 8))[1]
    np.testing.assert_array_equal(one_word, np.tile(np.arange(16) == 0, (8, 1)))


def test_the_same_key_hides_the_same_words():
    np.testing.assert_array_equal(masked()[0], masked()[0])


def test_the_loss_is_the_cross_entropy_of_what_is_hidden_a_mean_over_each_caption():
    t = task(rate=0.3)
    params = unboxed(t.init(jax.random.key(0)))
    ids, lengths, keys = IDS[:4], jnp.full((4,), 12), jax.random.split(jax.random.key(3), 4)
    found = t.losses(params, {"input_ids": ids, "lengths": lengths}, keys)
    shown, chosen = jax.vmap(t.mask)(ids, lengths, keys)
    states = t.module.apply({"params": params}, shown, lengths)
    logits = np.asarray(states, np.float64) @ np.asarray(params["embedding"], np.float64).T / np.sqrt(16)
    log_likelihood = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row in range(4):
        places = np.flatnonzero(chosen[row])
        expected = -np.mean([log_likelihood[row, place, ids[row, place]] for place in places])
        assert float(found["loss"][row]) == pytest.approx(expected, rel=1e-4)
        assert float(found["accuracy"][row]) == pytest.approx(np.mean(logits[row, places].argmax(-1) == ids[row, places]))

"""The decoder of one or more layers against transformers' T5ForConditionalGeneration, with the same
weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from transformers import T5Config as TorchConfig
from transformers import T5ForConditionalGeneration

from pixart_jax.models.configs import T5Config
from pixart_jax.models.t5 import T5Encoder, relative_buckets
from pixart_jax.models.t5_decoder import T5Decoder
from pixart_jax.weights import t5 as tables
from tests.models.reference import randomise, relative_error, t5_params
from tests.parameters import normal_params

CONFIG = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)


def reference(layers: int) -> T5ForConditionalGeneration:
    """transformers' whole T5 with random weights."""
    fields = {**tables.config_to_json(CONFIG), "is_encoder_decoder": True}
    fields |= {"num_decoder_layers": layers, "tie_word_embeddings": True}
    model = T5ForConditionalGeneration(TorchConfig(**fields))
    return randomise(model, spread=0.3, centre=1.0)


def decoder_params(state: dict, layers: int) -> dict:
    def attention(of: str, norm: str) -> dict:
        kernels = {name: {"kernel": state[f"{of}.{name}.weight"].T} for name in "qkv"}
        out = {"kernel": state[f"{of}.o.weight"].T}
        return kernels | {"out": out, "norm": {"scale": state[f"{norm}.weight"]}}

    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    params = {"relative_bias": state[bias]}
    params["final_norm"] = {"scale": state["decoder.final_layer_norm.weight"]}
    for i in range(layers):
        at = f"decoder.block.{i}.layer"
        params[f"self_attention_{i}"] = attention(f"{at}.0.SelfAttention", f"{at}.0.layer_norm")
        params[f"cross_attention_{i}"] = attention(f"{at}.1.EncDecAttention", f"{at}.1.layer_norm")
        mlp = {
            name: {"kernel": state[f"{at}.2.DenseReluDense.{name}.weight"].T}
            for name in ("wi_0", "wi_1", "wo")
        }
        params[f"mlp_{i}"] = mlp | {"norm": {"scale": state[f"{at}.2.layer_norm.weight"]}}
    return params


@pytest.mark.parametrize("layers", (1, 3))
def test_logits_are_transformers(layers):
    model = reference(layers)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = t5_params(CONFIG, state)
    rng = np.random.default_rng(0)
    ids, target = rng.integers(1, 50, (3, 23)), rng.integers(1, 50, (3, 41))
    lengths = np.array([23, 1, 9])
    mask = torch.from_numpy((np.arange(23) < lengths[:, None]).astype(np.int64))
    with torch.no_grad():
        given = (torch.from_numpy(ids), mask)
        expected = model(*given, labels=torch.from_numpy(target)).logits.numpy()

    @jax.jit
    def run(params, decoder):
        states = T5Encoder(CONFIG).apply({"params": params}, ids, lengths)
        given = params["embedding"], target, states, lengths
        return T5Decoder(CONFIG, layers).apply({"params": decoder}, *given)

    found = run(params, decoder_params(state, layers))
    assert relative_error(found, expected) < 1e-4


def test_no_token_sees_itself_or_what_comes_after():
    decoder, rng, lengths = T5Decoder(CONFIG), np.random.default_rng(0), np.array([5])
    table, states = rng.normal(size=(50, 16)), rng.normal(size=(1, 5, 16))
    target = np.arange(10)[None] + 1
    other = np.where(np.arange(10) == 6, 30, target)
    params = normal_params(decoder.init, table, target, states, lengths)
    run = jax.jit(decoder.apply)
    before, after = (run(params, table, ids, states, lengths) for ids in (target, other))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (before[:, 7] != after[:, 7]).any()


def test_a_causal_bucket_counts_how_far_behind_a_key_lies():
    table = relative_buckets(200, causal=True)
    assert (table[np.triu_indices(200)] == 0).all() and table.max() == 31
    assert (table[100, 85:101] == np.arange(15, -1, -1)).all()

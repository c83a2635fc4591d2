"""The T5 encoder with int8 kernels: what it holds, how far its states are from those of floats, and
what is drawn from them."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax import Pipeline
from pixart_jax.errors import UserError
from pixart_jax.models.configs import T5Config
from pixart_jax.models.t5 import T5Encoder
from pixart_jax.text import tokenize
from tests.models.reference import quantized, relative_error, rms_error

EXAMPLE = (jnp.zeros((1, 2), int), jnp.ones((1,), int))


def drawn(config: T5Config) -> dict:
    """T5's own initialisation, whose sizes trained weights keep about."""
    init = jax.jit(T5Encoder(config).init)
    return nn.unbox(init(jax.random.key(0), *EXAMPLE))["params"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_small_encoder_stays_near_its_float_states(dtype):
    config = T5Config(vocab_size=512, d_model=256, d_kv=32, d_ff=640, num_layers=6, num_heads=8)
    params = drawn(config)
    held = quantized(params)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (4, 48))
    lengths = np.array([48, 31, 12, 3])
    counted = np.arange(48) < lengths[:, None]

    def run(params, **options):
        module = T5Encoder(config, **options)
        return jax.jit(module.apply)({"params": params}, ids, lengths)

    exact, floats = run(params)[counted], run(params, dtype=dtype)[counted]
    int8 = run(held, dtype=dtype, quantization="int8")
    assert int8.dtype == jnp.float32
    # not nothing: the kernels are really rounded
    assert 1e-3 < rms_error(int8[counted], floats) < 0.03
    assert rms_error(int8[counted], exact) < 0.03
    assert relative_error(int8[counted], exact) < 0.04


@pytest.mark.usefixtures("optimized")
def test_t5_xxl_takes_half_the_memory_and_no_second_copy_in_floats():
    module = T5Encoder(T5Config(), dtype=jnp.bfloat16, quantization="int8")
    ids, lengths = jax.ShapeDtypeStruct((1, 120), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), ids, lengths))["params"]
    params["embedding"] = jax.ShapeDtypeStruct(params["embedding"].shape, jnp.bfloat16)
    lowered = jax.jit(module.apply).lower({"params": params}, ids, lengths)
    memory = lowered.compile().memory_analysis()
    assert memory.argument_size_in_bytes < 4.91e9  # 9.53e9 with bfloat16 kernels
    assert memory.temp_size_in_bytes < 1e9


@pytest.mark.slow
def test_the_shipped_model_draws_nearly_the_same_from_int8_states(root):
    pipe = Pipeline.from_pretrained(root / "assets" / "shapes")
    config, params = pipe.text_encoder.config, pipe.text_encoder.params
    prompts = (root / "configs" / "shapes_prompts.txt").read_text(encoding="utf-8").splitlines()[:8]
    tokens = pipe.transformer.config.text_tokens
    ids, lengths = tokenize(pipe.tokenizer, prompts, tokens)
    empty, empty_lengths = tokenize(pipe.tokenizer, [""] * len(prompts), tokens, ids.shape[1])
    own = {name: getattr(pipe.sampling, name) for name in ("steps", "guidance", "solver")}

    def draw(module, params, seed):
        states, negative = (
            module.apply({"params": params}, *text)
            for text in ((ids, lengths), (empty, empty_lengths))
        )
        side = pipe.transformer.config.sample_size * pipe.factor
        noise, _ = pipe.noise(seed, range(len(prompts)), side, side)
        latents = pipe.denoise(states, lengths, noise, negative, empty_lengths, **own)
        return states, np.asarray(pipe.decode(latents), np.float64)

    def likeness(images):
        return 10 * np.log10(255**2 / np.square(images - exact_images).mean((1, 2, 3)))

    exact, exact_images = draw(T5Encoder(config), params, 0)
    states, images = draw(T5Encoder(config, quantization="int8"), quantized(params), 0)
    _, others = draw(T5Encoder(config), params, 1)
    counted = np.arange(ids.shape[1]) < lengths[:, None]
    assert rms_error(states[counted], exact[counted]) < 0.01
    assert likeness(images).min() > 38 and np.median(likeness(images)) > 50  # dB
    assert np.median(likeness(others)) < 30  # what another seed's images have in common with these


@pytest.mark.parametrize(("quantization", "held"), [(None, "int8 values"), ("int8", "floats")])
def test_kernels_of_the_other_kind_are_named(quantization, held):
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    params = drawn(config) if quantization else quantized(drawn(config))
    with pytest.raises(UserError, match=f"blocks/q/kernel holds {held}"):
        module = T5Encoder(config, quantization=quantization)
        jax.eval_shape(module.apply, {"params": params}, *EXAMPLE)


def test_an_unknown_quantization_is_named():
    with pytest.raises(UserError, match="quantization 'int9' is unknown.*int8"):
        T5Encoder(T5Config(), quantization="int9").init(jax.random.key(0), *EXAMPLE)

"""Two layers of T5-XXL's width against transformers in fp32, with a residual stream that fp16 could
not hold.

T5's activations grow so: a trained T5-XXL's do in a few channels. Powers of two scale the first
layer's wo, so that every format holds the scaled weights as exactly as the plain ones.
"""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import T5Config as TorchConfig
from transformers import T5EncoderModel

from pixart_jax.models.configs import T5Config
from pixart_jax.models.t5 import T5Encoder
from pixart_jax.weights import t5 as tables
from pixart_jax.weights.streaming import read
from tests.models.reference import relative_error, rms_error, t5_params, t5_shapes

pytestmark = pytest.mark.usefixtures("optimized")
CONFIG = T5Config(vocab_size=256, num_layers=2)
IDS, LENGTHS = np.random.default_rng(1).integers(0, 256, (2, 48)), np.array([48, 31])
COUNTED = np.arange(48) < LENGTHS[:, None]
FP16_LARGEST = 65504
GROWTH = {  # of each channel that the first layer's wo writes
    "none": np.ones(4096, np.float32),
    "every channel": np.full(4096, 2.0**15, np.float32),
    "a few channels": np.where(np.arange(4096) % 512 == 0, 2.0**17, 1.0).astype(np.float32),
}


@pytest.fixture(scope="module")
def encoder(whole_memory):
    """({growth: (fp32 states, largest of the residual stream)}, bfloat16 parameters, int8
    parameters) of the same weights."""
    torch.manual_seed(0)
    model = T5EncoderModel(TorchConfig(**tables.config_to_json(CONFIG))).eval()
    reference = {}
    with torch.no_grad():
        wo = model.encoder.block[0].layer[1].DenseReluDense.wo.weight  # [out, in]
        for name, growth in GROWTH.items():
            wo.mul_(torch.tensor(growth)[:, None])
            mask = torch.tensor(COUNTED.astype(int))
            out = model(torch.tensor(IDS), attention_mask=mask, output_hidden_states=True)
            wo.div_(torch.tensor(growth)[:, None])
            largest = float(out.hidden_states[1].abs().max())
            reference[name] = out.last_hidden_state.numpy()[COUNTED], largest
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    del model, out, wo

    def kept(path: str) -> np.dtype:
        narrow = path.endswith("kernel") or path == "embedding"
        return np.dtype(jnp.bfloat16 if narrow else np.float32)

    floats = t5_params(CONFIG, state, dtype=kept)
    shapes = t5_shapes(CONFIG, quantization="int8")
    how = {"ignore": tables.IGNORED, "dtype": kept, "quantization": "int8"}
    int8 = read(tables.TRANSFORMERS, shapes, state, **how)
    state.clear()
    gc.collect()
    return reference, floats, int8


def states(params: dict, growth: str, dtype, quantization: str | None = None) -> np.ndarray:
    """States of the tokens that count, with wo of the first layer scaled."""
    scale = np.stack([GROWTH[growth], np.ones_like(GROWTH[growth])])[:, None]
    kernel = params["blocks"]["wo"]["kernel"]
    if quantization:
        kernel = kernel.replace(scale=kernel.scale * scale)
    else:
        kernel = kernel * scale.astype(kernel.dtype)
    params = {**params, "blocks": {**params["blocks"], "wo": {"kernel": kernel}}}
    module = T5Encoder(CONFIG, dtype=dtype, quantization=quantization)
    return np.asarray(jax.jit(module.apply)({"params": params}, IDS, LENGTHS))[COUNTED]


@pytest.mark.slow
@pytest.mark.parametrize("growth", GROWTH)
def test_bfloat16_stays_finite_and_near_fp32_however_large_the_residual_stream(encoder, growth):
    reference, params, _ = encoder
    exact, largest = reference[growth]
    assert (largest > 1e5) == (growth != "none")
    ours = states(params, growth, jnp.bfloat16)
    assert np.isfinite(ours).all()
    assert relative_error(ours, exact) <= 2e-2
    assert rms_error(ours, exact) <= 1e-2


@pytest.mark.slow
def test_these_weights_are_beyond_fp16(encoder):
    reference, params, _ = encoder
    assert reference["every channel"][1] > FP16_LARGEST
    assert not np.isfinite(states(params, "every channel", jnp.float16)).all()


@pytest.mark.slow
@pytest.mark.parametrize("growth", GROWTH)
def test_int8_kernels_stay_near_bfloat16_and_fp32(encoder, growth):
    reference, params, int8 = encoder
    exact, floats = reference[growth][0], states(params, growth, jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        ours = states(int8, growth, dtype, "int8")
        assert rms_error(ours, exact) <= 2.5e-2
        assert relative_error(ours, exact) <= 5e-2
    assert rms_error(ours, floats) <= 2.5e-2

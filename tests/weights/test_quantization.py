"""Int8 kernels as they are loaded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from pixart_jax.models.configs import T5Config
from pixart_jax.models.quantization import applies, leaf, quantize, quantize_matrix
from pixart_jax.weights.component import TextEncoder
from tests.models.reference import quantized, random_params, t5_shapes

CONFIG = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=4)


def stack(dtype=np.float32) -> np.ndarray:
    """Kernels [layers, in, out] whose channels differ in size by many orders of magnitude, one of
    them empty."""
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(3, 64, 40)) * 10.0 ** rng.integers(-6, 5, (3, 1, 40))
    kernels[1, :, 7] = 0
    return kernels.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_no_value_is_further_than_half_a_step_from_what_it_stands_for(dtype):
    kernels = stack(dtype)
    held = jax.tree.map(np.asarray, quantize(kernels))
    assert held.qvalue.dtype == np.int8
    assert held.scale.dtype == np.float32 and held.scale.shape == (3, 1, 40)
    error = np.abs(held.qvalue * held.scale.astype(np.float64) - kernels.astype(np.float64))
    assert (error <= held.scale * 0.50001).all()
    largest = np.abs(kernels.astype(np.float64)).max(-2, keepdims=True)
    np.testing.assert_allclose(held.scale, np.where(largest > 0, largest / 127.5, 1.0), rtol=1e-6)
    # the whole range is used, and never wraps round
    assert np.abs(held.qvalue.astype(int)).max(-2)[largest[:, 0] > 0].min() == 127


def test_parts_of_a_stack_give_the_parts_of_its_leaf():
    kernels = stack()
    whole = quantize(kernels)
    for layer in range(3):
        sliced = jax.tree.map(lambda a: a[0], quantize(kernels[layer : layer + 1]))
        for part in (quantize(kernels[layer]), sliced):
            np.testing.assert_array_equal(part.qvalue, whole.qvalue[layer])
            np.testing.assert_array_equal(part.scale, whole.scale[layer])


def test_a_matrix_of_a_file_gives_the_same_bits():
    kernel = stack()[0]
    whole = quantize(kernel)
    values, scale = quantize_matrix(np.ascontiguousarray(kernel.T))
    np.testing.assert_array_equal(values, whole.qvalue)
    np.testing.assert_array_equal(scale, whole.scale)
    assert jax.tree.structure(leaf(values, scale)) == jax.tree.structure(whole)


@pytest.mark.parametrize(
    "path", ["embedding", "relative_bias", "blocks/attention_norm/scale", "final_norm/scale"]
)
def test_what_is_no_kernel_stays_as_it_is(path):
    assert not applies(path) and applies("blocks/q/kernel")


def test_what_is_loaded_has_the_make_of_what_the_module_asks_for():
    asked = t5_shapes(CONFIG, quantization="int8")
    loaded = quantized(random_params(TextEncoder, CONFIG))
    # so a tree of shardings fits it too
    assert jax.tree.structure(loaded) == jax.tree.structure(asked)
    one, other = (jax.tree.map(lambda a: (a.shape, str(a.dtype)), t) for t in (loaded, asked))
    assert one == other
    assert isinstance(loaded["blocks"]["wo"]["kernel"], qwix.QArray)

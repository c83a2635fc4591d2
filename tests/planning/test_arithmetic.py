"""Products counted from the traced step: loops and recomputation with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pixart_jax.planning.arithmetic import products


def count(function, *shapes):
    return products(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def test_a_product_is_two_flops_a_term_and_moves_its_three_arrays():
    found = count(jnp.dot, (3, 5), (5, 7))
    assert (found.flops, found.bytes) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))


def test_a_scan_counts_as_often_as_it_turns():
    found = count(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=11)[0], (3, 5), (5, 5))
    assert found.flops == 11 * 2 * 3 * 5 * 5


def test_of_a_conditional_the_dearest_branch_counts():
    found = count(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), (3, 5), (5, 5))
    assert found.flops == 2 * 2 * 3 * 5 * 5


def test_a_convolution_counts_its_window():
    found = count(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
                  (2, 8, 8, 3), (3, 3, 3, 5))  # fmt: skip
    assert found.flops == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


@pytest.mark.parametrize("remat, passes", [("none", 3), ("full", 4)])
def test_recomputation_is_one_more_forward_pass(remat, passes):
    def layer(x, w):
        return jnp.sin(x @ w), None

    layer = layer if remat == "none" else jax.checkpoint(layer, prevent_cse=False)

    def loss(w, x):
        return jax.lax.scan(layer, x, w)[0].sum()

    one = 2 * 4 * 8 * 8 * 6
    found = count(lambda w, x: jax.grad(loss, argnums=(0, 1))(w, x), (6, 8, 8), (4, 8))
    assert found.flops == passes * one

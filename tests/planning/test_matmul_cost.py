"""Products counted from the traced step: loops and recomputation with them."""

from __future__ import annotations

import functools

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from pixart_jax.planning.matmul_cost import matmul_cost


def count(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return matmul_cost(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_a_product_is_two_flops_a_term_and_moves_its_three_arrays():
    found = count(jnp.dot, (3, 5), (5, 7))
    assert (found.flops, found.bytes) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=11)[0]


def partly_unused(x, w):
    unused = (x @ w) @ w
    return x @ w, jax.lax.scan(lambda c, _: (c, unused.sum()), 0.0, None, length=3)[0]


def conditional(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)


@pytest.mark.parametrize("program, products", [(scanned, 11), (partly_unused, 1), (conditional, 2)])
def test_scans_count_each_turn_conditionals_their_largest_branch_and_unused_work_nothing(
    program, products
):
    assert count(program, (3, 5), (5, 5)).flops == products * 2 * 3 * 5 * 5


def test_a_convolution_counts_its_window():
    how = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    convolution = functools.partial(jax.lax.conv_general_dilated, **how)
    found = count(lambda x, k: convolution(x, k, (1, 1), "SAME"), (2, 8, 8, 3), (3, 3, 3, 5))
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


def test_of_a_mesh_every_device_counts():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"), axis_types=auto)
    specs = {"in_specs": (P("data", None), P(None, "tensor")), "out_specs": P("data", "tensor")}
    with jax.sharding.use_abstract_mesh(mesh):
        found = count(jax.shard_map(jnp.dot, **specs), (6, 5), (5, 8))
    assert found.flops == 2 * 6 * 5 * 8


def test_a_kernel_counts_each_cell_of_its_grid_and_moves_its_arrays_once():
    def cell(x, w, out):
        out[...] = jnp.dot(x[...], w[...])

    def kernel(x, w):
        rows, out = (pl.BlockSpec((8, size), lambda i: (i, 0)) for size in (16, 4))
        whole = pl.BlockSpec((16, 4), lambda i: (0, 0))
        shape = jax.ShapeDtypeStruct((24, 4), jnp.float32)
        how = {"in_specs": [rows, whole], "out_specs": out, "out_shape": shape}
        return pl.pallas_call(cell, grid=(3,), **how)(x, w)

    found = count(kernel, (24, 16), (16, 4))
    assert (found.flops, found.bytes) == (2 * 24 * 16 * 4, 4 * (24 * 16 + 16 * 4 + 24 * 4))


@pytest.mark.parametrize("name, products_of_it", [("fwd", 2), ("bwd", 5)])
def test_cudnns_kernels_count_as_what_they_compute(name, products_of_it):
    kernel = jax.extend.core.Primitive(f"dot_product_attention_{name}_wrapper")
    kernel.def_abstract_eval(lambda q, k, v: q)
    shape, keys = (2, 6, 3, 8), (2, 5, 3, 8)  # [b, n, k, h]
    assert count(kernel.bind, shape, keys, keys).flops == products_of_it * 2 * (2 * 3) * 6 * 5 * 8

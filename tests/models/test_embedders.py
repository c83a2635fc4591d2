"""The position table against the published formula written out, and its range on any grid."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pixart_jax.models.embedders import sincos_2d


@pytest.mark.parametrize(
    "height, width, dim, base, scale", [(4, 4, 16, 4, 1.0), (3, 5, 8, 16, 2.0), (6, 2, 24, 32, 0.5)]
)
def test_table_is_the_formula_entry_by_entry(height, width, dim, base, scale):
    table = sincos_2d(height, width, dim, base, scale)
    assert table.shape == (height * width, dim) and table.dtype == np.float32
    quarter = dim // 4
    for row in range(height):
        for column in range(width):
            expected = []
            for place, count in ((column, width), (row, height)):  # x first
                coordinate = place / (count / base) / scale
                for function in (math.sin, math.cos):
                    expected += [
                        function(coordinate / 10000 ** (j / quarter)) for j in range(quarter)
                    ]
            np.testing.assert_allclose(table[row * width + column], expected, atol=1e-6)


@pytest.mark.parametrize("height, width", [(8, 8), (5, 12)])
def test_table_equals_diffusers(height, width):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(
        32, (height, width), base_size=16, interpolation_scale=2.0, output_type="pt"
    )
    np.testing.assert_allclose(
        sincos_2d(height, width, 32, 16, 2.0),
        np.asarray(theirs).reshape(height * width, 32),
        atol=1e-6,
    )


def test_a_finer_grid_passes_through_the_coarse_ones_places():
    coarse, fine = (sincos_2d(n, n, 16, 16, 1.0).reshape(n, n, 16) for n in (8, 16))
    np.testing.assert_allclose(fine[::2, ::2], coarse, atol=1e-6)

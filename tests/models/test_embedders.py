"""The position table against diffusers', and its range on any grid."""

from __future__ import annotations

import numpy as np
import pytest

from pixart_jax.models.embedders import sincos_2d


@pytest.mark.parametrize(
    "height, width, dim, base, scale",
    [(8, 8, 32, 16, 2.0), (5, 12, 32, 16, 2.0), (4, 4, 16, 4, 1.0), (6, 2, 24, 32, 0.5)],
)
def test_table_equals_diffusers(height, width, dim, base, scale):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    how = {"base_size": base, "interpolation_scale": scale, "output_type": "pt"}
    theirs = np.asarray(get_2d_sincos_pos_embed(dim, (height, width), **how))
    table = sincos_2d(height, width, dim, base, scale)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table, theirs.reshape(height * width, dim), atol=2e-6)


def test_a_finer_grid_passes_through_the_coarse_ones_places():
    coarse, fine = (sincos_2d(n, n, 16, 16, 1.0).reshape(n, n, 16) for n in (8, 16))
    np.testing.assert_allclose(fine[::2, ::2], coarse, atol=1e-6)

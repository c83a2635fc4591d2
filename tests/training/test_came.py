"""CAME beside a float64 evaluation of the paper's Algorithm 2, one tensor at a time, written with
plain loops."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.training.came import scale_by_came

B1, B2, B3, EPS1, EPS2, D = 0.9, 0.999, 0.9999, 1e-30, 1e-16, 1.0


class Reference:
    """One tensor of one layer, float64."""

    def __init__(self, shape):
        self.m, self.v = np.zeros(shape), np.zeros(shape)
        self.r, self.rr = np.zeros((2, *shape[:-1]))
        self.c, self.cc = np.zeros((2, *shape[:-2], shape[-1]))

    @staticmethod
    def outer(row, col):
        out = np.empty((*row.shape, col.shape[-1]))
        for place in np.ndindex(*row.shape[:-1]):
            out[place] = np.outer(row[place], col[place]) / row[place].mean()
        return out

    def update(self, g):
        g = np.asarray(g, np.float64)
        if g.ndim > 1:
            self.r = B2 * self.r + (1 - B2) * (g**2 + EPS1).mean(-1)
            self.c = B2 * self.c + (1 - B2) * (g**2 + EPS1).mean(-2)
            v = self.outer(self.r, self.c)
        else:
            v = self.v = B2 * self.v + (1 - B2) * (g**2 + EPS1)
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt((u**2).mean()) / D)
        self.m = B1 * self.m + (1 - B1) * u
        if g.ndim == 1:
            return self.m
        s = (u - self.m) ** 2 + EPS2
        self.rr = B3 * self.rr + (1 - B3) * s.mean(-1)
        self.cc = B3 * self.cc + (1 - B3) * s.mean(-2)
        return self.m / np.sqrt(self.outer(self.rr, self.cc))


@pytest.mark.parametrize("shape", [(7,), (5, 8), (3, 3, 4, 6)])
def test_came_follows_the_formulas(shape):
    came = scale_by_came(B1, B2, B3, (EPS1, EPS2), D)
    state, reference = came.init({"w": jnp.zeros(shape)}), Reference(shape)
    rng = np.random.default_rng(1)
    for _ in range(6):
        g = rng.normal(size=shape)
        update, state = came.update({"w": jnp.asarray(g, jnp.float32)}, state)
        np.testing.assert_allclose(update["w"], reference.update(g), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (5, 8)])
def test_stacked_layers_are_updated_as_they_would_be_apart(shape):
    came, rng = scale_by_came(), np.random.default_rng(2)
    stacked = scale_by_came(stacked={"w": True})
    state = stacked.init({"w": jnp.zeros((3, *shape))})
    alone = [came.init({"w": jnp.zeros(shape)}) for _ in range(3)]
    scale = np.array([1, 10, 100]).reshape(3, *[1] * len(shape))
    for _ in range(3):
        g = jnp.asarray(rng.normal(size=(3, *shape)) * scale, jnp.float32)
        update, state = stacked.update({"w": g}, state)
        for layer in range(3):
            one, alone[layer] = came.update({"w": g[layer]}, alone[layer])
            np.testing.assert_allclose(update["w"][layer], one["w"], rtol=1e-5)


def test_second_moments_take_the_memory_of_rows_and_columns():
    state = scale_by_came().init({"w": jnp.zeros((64, 128))})
    assert sum(x.size for x in jax.tree.leaves((state.second, state.residual))) == 2 * (64 + 128)

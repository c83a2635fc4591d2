"""The mesh: sizes that fit, and those that do not."""

from __future__ import annotations

import jax
import pytest

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.parallel.mesh import AXES, batch_shards, make_mesh


def test_the_rest_goes_to_the_axis_that_asks_for_it():
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    assert mesh.axis_names == AXES
    assert mesh.size == jax.device_count() and mesh.shape["fsdp"] == jax.device_count()
    assert batch_shards(mesh) == jax.device_count()


@pytest.mark.parametrize("sizes", [{"fsdp": 7}, {"data": 64}, {"data": 5, "tensor": 3}])
def test_a_mesh_that_does_not_fit_is_one_clear_line(sizes):
    with pytest.raises(UserError, match="does not fit 1 device") as fault:
        make_mesh(MeshConfig(**sizes), jax.devices()[:1])
    assert "\n" not in str(fault.value)


def test_two_rests_are_refused():
    with pytest.raises(UserError, match="only one axis"):
        MeshConfig(data=-1, fsdp=-1)

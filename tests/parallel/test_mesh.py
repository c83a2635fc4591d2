"""The mesh: sizes that fit, and those that do not."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import pytest

from pixart_jax.config import MeshConfig
from pixart_jax.errors import UserError
from pixart_jax.parallel.mesh import (
    AXES,
    batch_shards,
    check_divides,
    make_mesh,
    multislice_mesh,
    slices,
)


def test_the_rest_goes_to_the_axis_that_asks_for_it():
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    assert mesh.axis_names == AXES
    assert mesh.size == jax.device_count() and mesh.shape["fsdp"] == jax.device_count()
    assert batch_shards(mesh) == jax.device_count()


@pytest.mark.parametrize("sizes", [{"fsdp": 7}, {"data": 64}, {"data": 5, "tensor": 3}])
def test_a_mesh_that_does_not_fit_is_one_clear_line(sizes):
    with pytest.raises(UserError, match="does not fit 1 device") as error:
        make_mesh(MeshConfig(**sizes), jax.devices()[:1])
    assert "\n" not in str(error.value)


def test_two_rests_are_refused():
    with pytest.raises(UserError, match="only one axis"):
        MeshConfig(data=-1, fsdp=-1)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the mesh asks of a TPU device."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def two_slices() -> list[Chip]:
    """Two slices of 2 × 4 chips, listed in turns, as no order is promised."""
    places = itertools.product(range(2), range(4), range(2))
    return [Chip(8 * s + 4 * x + y, s, (x, y, 0)) for x, y, s in places]


@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (4, 2, 1, 2), (16, 1, 1, 1), (2, 2, 4, 1)])
def test_slices_lie_along_data_and_no_other_axis_crosses_them(shape):
    devices = multislice_mesh(shape, two_slices())
    assert devices.shape == shape
    rows = devices.reshape(shape[0], -1)
    of_rows = [{device.slice_index for device in row} for row in rows]
    assert all(len(own) == 1 for own in of_rows)
    assert [own.pop() for own in of_rows] == [0] * (shape[0] // 2) + [1] * (shape[0] // 2)
    assert len({device.id for device in devices.flat}) == 16


def test_data_that_slices_do_not_divide_is_one_clear_line():
    assert slices(two_slices()) == 2
    with pytest.raises(UserError, match="mesh data 1 is not a multiple of the 2 slices"):
        multislice_mesh((1, 16, 1, 1), two_slices())


def test_devices_that_are_no_tpus_are_one_slice():
    hosts = [dataclasses.replace(chip, platform="gpu") for chip in two_slices()]
    assert slices(hosts) == slices(jax.devices()) == 1


def abstract(**sizes):
    return jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)


@pytest.mark.parametrize(
    ("sizes", "sides", "says"),
    [
        ({"tensor": 3}, {"heads": 16, "mlp_width": 4608}, "16 heads; tensor 1, 2 or 4 would do"),
        (
            {"context": 4},
            {"tokens": {"bucket 32×32": 4, "bucket 32×48": 6}},
            "bucket 32×48 (6 tokens); context 1 or 2 would do",
        ),
    ],
)
def test_what_does_not_divide_is_named_with_what_would(sizes, sides, says):
    fits = {"heads": 16, "mlp_width": 4608, "tokens": {"bucket 256×256": 256}}
    check_divides(abstract(tensor=4, context=2), "stage words", **fits)
    ((axis, size),) = sizes.items()
    with pytest.raises(UserError) as error:
        check_divides(abstract(**sizes), "stage words", **sides)
    assert str(error.value) == f"stage words: mesh {axis} {size} does not divide {says}"

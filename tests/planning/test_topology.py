"""Hardware by name."""

from __future__ import annotations

import importlib.metadata

import jax
import pytest

from pixart_jax.errors import UserError
from pixart_jax.parallel.chips import CHIPS
from pixart_jax.planning import topology


@pytest.mark.parametrize(
    "name, slices, platform, size",
    [
        ("v5e:16x16", 1, "tpu", 256),
        ("v5e:16x16", 2, "tpu", 512),
        ("v5p:4x4x4", 1, "tpu", 64),
        ("v4:2x2x2", 1, "tpu", 8),
        ("tpu7x:2x2x1", 1, "tpu", 8),
        ("h200:8", 1, "cuda", 8),
        ("h100:8x4", 1, "cuda", 32),
        ("cpu:8", 1, "cpu", 8),
    ],
)
def test_a_name_says_how_many_devices_it_is(name, slices, platform, size):
    found = topology.parse(name, slices)
    assert (found.platform, found.size) == (platform, size)
    assert platform == "cpu" or found.chip is CHIPS[name.split(":")[0]]


@pytest.mark.parametrize(
    "name, slices, says",
    [
        ("v5e:3x5", 1, "v5e:4x4"),
        ("v5e", 1, "v5e:16x16"),
        ("v9:4x4", 1, "tpu7x"),
        ("h200:9", 1, "h200:8xN"),
        ("h200:8", 2, "h200:8x2"),
        ("cpu:0", 1, "cpu:N"),
        ("cpu:8", 2, "slices"),
        ("v5e:4x4", 0, "at least 1"),
        ("", 1, "v5e"),
    ],
)
def test_a_name_that_does_not_exist_lists_those_that_do(name, slices, says):
    with pytest.raises(UserError) as error:
        topology.parse(name, slices)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_dimension_closes_to_a_ring_where_the_hardware_closes_it():
    rings = [("v5e:16x16", 0), ("v5e:8x16", 1), ("v5p:4x4x4", 2)]
    lines = [("v5e:8x16", 0), ("v5p:2x4x4", 1)]
    assert all(topology.parse(name).wraps(side) for name, side in rings)
    assert not any(topology.parse(name).wraps(side) for name, side in lines)


@pytest.mark.parametrize(
    "name, package",
    [("v5e:4x4", "libtpu==0.0."), ("h200:8", f"jax-cuda13-plugin=={jax.__version__}")],
)
@pytest.mark.parametrize("found", [None, "0.0.1"])
def test_a_missing_or_unfit_compiler_is_one_line_with_the_command_that_installs_it(
    name, package, found, monkeypatch
):
    def version(distribution: str) -> str:
        if distribution == "jax":
            return jax.__version__
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(topology.importlib.metadata, "version", version)
    with pytest.raises(UserError, match="pip install") as error:
        topology.require_compiler(topology.parse(name))
    assert package in str(error.value) and "\n" not in str(error.value)


def test_the_compiler_that_jax_asks_for_is_taken():
    for platform in ("tpu", "cuda"):
        version = topology.wanted_compiler(platform).partition("==")[2].replace("*", "7")
        assert topology.compiler_error(platform, version) is None

"""Where parameters lie. An abstract mesh of eight devices is enough to say."""

from __future__ import annotations

import types

import jax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import AXES


def mesh(data=1, fsdp=8, context=1, tensor=1):
    return jax.sharding.AbstractMesh((data, fsdp, context, tensor), AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("embed", "heads"), (1152, 1152), ("fsdp", None)),  # tensor is 1
        (("layers", "embed", "mlp"), (28, 1152, 4608), (None, "fsdp", None)),
        (("text", "embed"), (4096, 1152), ("fsdp", None)),  # one mesh axis cuts one dimension only
        (("layers", None, "norm"), (28, 6, 1152), (None, None, None)),  # the tables stay whole
        (("norm",), (1152,), (None,)),
        ((None, "text"), (120, 4096), (None, "fsdp")),
        (("conv_in", "embed"), (7, 13), (None, None)),  # nothing divides, and it is small
    ],
)
def test_parameters_lie_over_fsdp(names, shape, spec):
    assert rules.parameter_spec(names, shape, 4, mesh()) == PartitionSpec(*spec)


def test_tensor_axis_cuts_heads_and_mlp():
    assert rules.parameter_spec(("embed", "heads"), (1152, 1152), 4, mesh(fsdp=4, tensor=2)) == PartitionSpec("fsdp", "tensor")
    assert rules.parameter_spec(("mlp", "embed"), (4608, 1152), 4, mesh(fsdp=4, tensor=2)) == PartitionSpec("tensor", "fsdp")


def test_a_large_parameter_without_a_fitting_name_is_cut_all_the_same():
    assert rules.parameter_spec((None, None), (515, 8000), 4, mesh()) == PartitionSpec(None, "fsdp")
    assert rules.parameter_spec(("embed", "modulation"), (515, 8000), 4, mesh()) == PartitionSpec(None, "fsdp")  # 515 is odd
    assert rules.parameter_spec(("layers", None), (1024, 515), 4, mesh()) == PartitionSpec(None, None)  # layers are never cut


def test_large_replicated_names_what_every_device_holds_whole():
    def leaf(shape, *spec):
        return types.SimpleNamespace(shape=shape, dtype=jax.numpy.dtype("float32"), sharding=NamedSharding(mesh(), PartitionSpec(*spec)))

    tree = {"blocks": {"kernel": leaf((1152, 1152), "fsdp")}, "table": leaf((28, 6, 1152)), "stray": leaf((1152, 1152))}
    assert rules.large_replicated(tree) == ["stray"]

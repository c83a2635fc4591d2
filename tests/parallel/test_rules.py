"""Where parameters lie. An abstract mesh of eight devices is enough to say."""

from __future__ import annotations

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pixart_jax.errors import UserError
from pixart_jax.models.transformer import PixArtTransformer, TransformerConfig
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import AXES


def mesh(data=1, fsdp=8, context=1, tensor=1):
    return jax.sharding.AbstractMesh(
        (data, fsdp, context, tensor), AXES, axis_types=(AxisType.Auto,) * 4
    )


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
    assert rules.parameter_spec(
        ("embed", "heads"), (1152, 1152), 4, mesh(fsdp=4, tensor=2)
    ) == PartitionSpec("fsdp", "tensor")
    assert rules.parameter_spec(
        ("mlp", "embed"), (4608, 1152), 4, mesh(fsdp=4, tensor=2)
    ) == PartitionSpec("tensor", "fsdp")


def test_a_large_parameter_without_a_fitting_name_is_cut_all_the_same():
    assert rules.parameter_spec((None, None), (515, 8000), 4, mesh()) == PartitionSpec(None, "fsdp")
    # 515 is odd
    assert rules.parameter_spec(("embed", "modulation"), (515, 8000), 4, mesh()) == PartitionSpec(
        None, "fsdp"
    )
    # layers are never cut
    assert rules.parameter_spec(("layers", None), (1024, 515), 4, mesh()) == PartitionSpec(
        None, None
    )


def test_large_replicated_names_what_every_device_holds_whole():
    def leaf(shape, *spec):
        return types.SimpleNamespace(
            shape=shape,
            dtype=jax.numpy.dtype("float32"),
            sharding=NamedSharding(mesh(), PartitionSpec(*spec)),
        )

    tree = {
        "blocks": {"kernel": leaf((1152, 1152), "fsdp")},
        "table": leaf((28, 6, 1152)),
        "stray": leaf((1152, 1152)),
    }
    assert rules.large_replicated(tree) == ["stray"]


def boxed(**parameters):
    """name=(logical names, shape) → boxed fp32 shapes, as eval_shape of a module's init gives
    them."""
    return {
        name: nn.Partitioned(jax.ShapeDtypeStruct(shape, "float32"), names)
        for name, (names, shape) in parameters.items()
    }


ODD = boxed(
    kernel=(("layers", "embed", "heads"), (4, 1024, 1024)),
    odd=(("layers", "embed", "mlp"), (4, 515, 517)),  # no side by eight: whole by accident
    bias=(("layers", "heads"), (4, 517)),
    table=(("layers", None, "norm"), (4, 6, 515)),
)


def test_what_is_whole_by_accident_is_told_from_what_is_whole_on_purpose():
    whole = rules.replication_report(ODD, mesh())
    assert whole.by_accident == {"odd": 4 * 515 * 517}
    assert whole.on_purpose == 4 * 517 + 4 * 6 * 515
    assert whole.total == 4 * (1024 * 1024 + 515 * 517 + 517 + 6 * 515)
    assert (
        rules.replication_report(ODD, mesh(data=8, fsdp=1)).share == 0
    )  # no fsdp axis, no accident


def test_more_than_two_percent_whole_by_accident_is_refused_with_names_and_share():
    with pytest.raises(
        UserError,
        match=r"fsdp 8 leaves 20% of the parameters .*1,065,020 of .* divides no side of odd; fsdp 1 would do",  # noqa: E501
    ) as fault:
        rules.check_sharded(ODD, mesh())
    assert "\n" not in str(fault.value)
    little = boxed(kernel=(("embed", "heads"), (8192, 4096)), odd=(("embed", "mlp"), (515, 517)))
    # 0.8 %
    assert rules.check_sharded(little, mesh()).share == pytest.approx(
        515 * 517 / (8192 * 4096 + 515 * 517)
    )


def test_nothing_of_xl2_is_whole_by_accident_on_256_chips():
    model = PixArtTransformer(TransformerConfig.preset("XL/2"))
    shapes = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, 2, 2, 4)),
        jnp.zeros((1,)),
        jnp.zeros((1, 1, 4096)),
        jnp.ones((1,), jnp.int32),
    )["params"]
    for fsdp in (8, 16, 64, 128):
        whole = rules.check_sharded(shapes, mesh(fsdp=fsdp))
        assert whole.share < 0.002 and whole.on_purpose < 0.002 * whole.total, (fsdp, whole)

"""Where parameters lie. An abstract mesh of eight devices is enough to say."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from pixart_jax.errors import UserError
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.transformer import PixArtTransformer
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
        # large and without a fitting name: cut all the same, but never along the layers
        ((None, None), (515, 8000), (None, "fsdp")),
        (("embed", "modulation"), (515, 8000), (None, "fsdp")),  # 515 is odd
        (("layers", None), (1024, 515), (None, None)),
    ],
)
def test_parameters_lie_over_fsdp(names, shape, spec):
    assert rules.parameter_spec(names, shape, 4, mesh()) == PartitionSpec(*spec)


def test_tensor_axis_cuts_heads_and_mlp():
    both = mesh(fsdp=4, tensor=2)
    heads = rules.parameter_spec(("embed", "heads"), (1152, 1152), 4, both)
    mlp = rules.parameter_spec(("mlp", "embed"), (4608, 1152), 4, both)
    assert heads == PartitionSpec("fsdp", "tensor") and mlp == PartitionSpec("tensor", "fsdp")


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


def test_over_two_percent_whole_by_accident_is_refused_with_names_and_share():
    says = r"fsdp 8 leaves 20% of the parameters .*1,065,020 of .* no side of odd; fsdp 1 would do"
    with pytest.raises(UserError, match=says) as error:
        rules.check_sharded(ODD, mesh())
    assert "\n" not in str(error.value)
    rules.check_sharded(ODD, mesh(data=8, fsdp=1))  # no fsdp axis, no accident
    few = boxed(kernel=(("embed", "heads"), (8192, 4096)), odd=(("embed", "mlp"), (515, 517)))
    rules.check_sharded(few, mesh())  # 0.8 %


def test_xl2_is_sharded_on_256_chips_but_for_vectors_and_tables():
    model = PixArtTransformer(TransformerConfig.preset("XL/2"))
    inputs = (jnp.zeros((1, 2, 2, 4)), jnp.zeros((1,)), jnp.zeros((1, 1, 4096)), jnp.ones(1, int))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    for fsdp in (8, 16, 64, 128):
        rules.check_sharded(shapes, mesh(fsdp=fsdp))
        leaves = jax.tree.leaves(rules.parameter_shardings(shapes, mesh(fsdp=fsdp)))
        sizes = [leaf.size for leaf in jax.tree.leaves(rules.unboxed(shapes))]
        whole = sum(n for n, leaf in zip(sizes, leaves, strict=True) if "fsdp" not in leaf.spec)
        assert whole < 0.003 * sum(sizes), fsdp

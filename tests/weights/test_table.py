"""The table of names: reading and writing are inverse to the bit, one tensor is in memory at a
time, and misfits are named together."""

from __future__ import annotations

import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.weights.files import Entry, Tensors
from pixart_jax.weights.streaming import read
from pixart_jax.weights.table import ParamMapping, flatten, grouped, unflatten, write

TABLE = (
    ParamMapping("blocks/q/kernel", "b.{i}.qkv.weight", "linear", (0, 3)),
    ParamMapping("blocks/k/kernel", "b.{i}.qkv.weight", "linear", (1, 3)),
    ParamMapping("blocks/v/kernel", "b.{i}.qkv.weight", "linear", (2, 3)),
    ParamMapping("conv/kernel", "conv.weight", "conv"),
    ParamMapping("point/kernel", "point.weight", "pointwise"),
    ParamMapping("scale", "norm.weight"),
    ParamMapping("null", "null", optional=True),
    # a parameter that this model does not have
    ParamMapping("variant/kernel", "variant.weight", "linear"),
)
RNG = np.random.default_rng(0)
THEIRS = {"b.0.qkv.weight": (12, 5), "b.1.qkv.weight": (12, 5), "conv.weight": (6, 2, 3, 4)}
THEIRS |= {"point.weight": (7, 3, 1, 1), "norm.weight": (9,), "null": (2, 2)}
FILE = {key: RNG.normal(size=size).astype(np.float32) for key, size in THEIRS.items()}
OURS = {f"blocks/{name}/kernel": (2, 5, 4) for name in "qkv"}
OURS |= {"conv/kernel": (3, 4, 2, 6), "point/kernel": (3, 7), "scale": (9,), "null": (2, 2)}
SHAPES = unflatten({path: np.empty(size) for path, size in OURS.items()})


def open_file(tensors=FILE, **options):
    return read(TABLE, SHAPES, tensors, **options)


def test_read_and_write_are_inverse_to_the_bit():
    params = open_file()
    found, wanted = ({k: v.shape for k, v in flatten(tree).items()} for tree in (params, SHAPES))
    assert found == wanted
    written = write(TABLE, params)
    assert set(written) == set(FILE)
    for key, array in FILE.items():
        np.testing.assert_array_equal(written[key], array)


def test_axes_and_parts_lie_as_they_should():
    params = open_file()
    np.testing.assert_array_equal(params["blocks"]["k"]["kernel"][1], FILE["b.1.qkv.weight"][4:8].T)
    assert params["conv"]["kernel"][2, 3, 1, 5] == FILE["conv.weight"][5, 1, 2, 3]
    np.testing.assert_array_equal(params["point"]["kernel"], FILE["point.weight"][:, :, 0, 0].T)


def test_a_parameter_of_some_layers_takes_those_layers_tensors():
    table = (ParamMapping("extra/scale", "b.{i}.extra", layers=(1, 3)),)
    tensors = {f"b.{i}.extra": np.full(2, i, np.float32) for i in (1, 3)}
    shapes = {"extra": {"scale": np.empty((2, 2))}}
    params = read(table, shapes, tensors)
    np.testing.assert_array_equal(params["extra"]["scale"], [[1, 1], [3, 3]])
    assert sorted(write(table, params)) == ["b.1.extra", "b.3.extra"]
    with pytest.raises(UserError, match="1 left over: b.0.extra"):
        read(table, shapes, {**tensors, "b.0.extra": np.zeros(2)})


class Watched(Tensors):
    """A file that records accesses. forbidden: only shapes may be read."""

    def __init__(self, tensors: dict[str, np.ndarray], forbidden: bool = False):
        self.events: list[tuple[str, str]] = []

        def entry(key: str, value: np.ndarray) -> Entry:
            def read():
                assert not forbidden, key
                self.events.append(("read", key))
                return value

            def advise(advice):
                if advice == "MADV_DONTNEED":
                    self.events.append(("release", key))

            return Entry(value.shape, read, advise)

        super().__init__("the file", {key: entry(key, value) for key, value in tensors.items()})


def test_one_tensor_at_a_time_is_read_and_released():
    file = Watched(FILE)
    read(TABLE, SHAPES, file)
    taken = [name for what, name in file.events if what == "read"]
    assert file.events == [(what, name) for name in taken for what in ("read", "release")]
    # q, k and v, which share the tensors, come first
    assert taken[:7] == 3 * ["b.0.qkv.weight", "b.1.qkv.weight"] + ["conv.weight"]


def test_an_optional_parameter_may_be_absent():
    params = open_file({key: value for key, value in FILE.items() if key != "null"})
    assert "null" not in params and "scale" in params


def test_ignored_keys_do_not_count():
    assert "scale" in open_file({**FILE, "pos_embed": np.zeros(1)}, ignore=("pos_embed",))


def test_missing_and_left_over_keys_are_named_together_before_anything_is_read():
    tensors = {**FILE, "stray": np.zeros(1)}
    del tensors["b.1.qkv.weight"], tensors["norm.weight"]

    says = "the file does not fit the model: 2 missing: b.1.qkv.weight, norm.weight; 1 left over: "
    with pytest.raises(UserError, match=f"{says}stray"):
        read(TABLE, SHAPES, Watched(tensors, forbidden=True))


def test_keys_that_differ_in_their_layer_alone_are_named_together():
    tensors = {key: value for key, value in FILE.items() if ".qkv." not in key}
    with pytest.raises(UserError, match=r"2 missing: b.\[0-1\].qkv.weight$"):
        open_file(tensors)
    names = ["a.7.x", "a.1.x", "a.0.x", "z", "a.1.y", "a.2"]
    assert grouped(names) == ["a.1.y", "a.2", "a.[0-1,7].x", "z"]


def test_every_wrong_shape_is_named_at_once():
    shapes = {"norm.weight": 8, "conv.weight": (6, 2), "b.0.qkv.weight": (11, 5)}
    with pytest.raises(UserError) as error:
        open_file({**FILE, **{key: np.zeros(shape) for key, shape in shapes.items()}})
    for says in (
        "wrong shape: b.0.qkv.weight (11, 5) for blocks/q/kernel (5, 4)",
        "conv.weight (6, 2) for conv/kernel (3, 4, 2, 6)",
        "norm.weight (8,) for scale (9,)",
    ):
        assert says in str(error.value)


def test_a_parameter_without_a_name_is_named():
    shapes = {**SHAPES, "new": {"kernel": np.empty(3)}}
    with pytest.raises(UserError, match="1 without a name in the table: new/kernel"):
        read(TABLE, shapes, FILE)

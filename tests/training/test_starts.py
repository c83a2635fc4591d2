"""What a stage may start from, and what it may not."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from pixart_jax.config import StageConfig
from pixart_jax.errors import UserError
from pixart_jax.training.initialization import convert_params

STAGE = StageConfig("words", "text_to_image")
TASK = types.SimpleNamespace(module=types.SimpleNamespace(config=None))
LAYER = {"kernel": np.ones((2, 2), np.float32)}
WANTED = {
    "blocks": {"kernel": np.ones((2, 3), np.float32)},
    "null_caption": np.full((4, 5), 3, np.float32),
    "size_embedder": {"fc1": LAYER, "fc2": LAYER},
}


def fresh():
    return jax.tree.map(jax.numpy.asarray, WANTED)


def begin(params, kind="text_to_image"):
    key = jax.random.key(0)
    return convert_params(STAGE, kind, None, params, TASK, fresh, key, lambda *_: None)


def test_the_same_parameters_go_on():
    given = jax.tree.map(lambda x: x * 7, WANTED)
    out = begin(given)
    jax.tree.map(np.testing.assert_array_equal, out, given)


def test_a_plain_model_gains_size_embedders_that_change_nothing_yet_and_a_null_caption():
    out = begin({"blocks": {"kernel": np.full((2, 3), 9, np.float32)}})
    assert (out["blocks"]["kernel"] == 9).all()
    first, last = (out["size_embedder"][name]["kernel"] for name in ("fc1", "fc2"))
    assert (first == 1).all() and (last == 0).all()
    assert (out["null_caption"] == 3).all()


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({**WANTED, "blocks": {}}, "1 missing: blocks/kernel"),
        ({**WANTED, "extra": np.ones(3)}, "1 left over: extra"),
        ({**WANTED, "blocks": {"kernel": np.ones((2, 4))}}, r"blocks/kernel \(2, 4\) for \(2, 3\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(params, said):
    with pytest.raises(UserError, match=said):
        begin(params)


def test_a_model_of_another_task_is_refused():
    with pytest.raises(UserError, match="cannot start from a model of task autoencoder"):
        begin(WANTED, kind="autoencoder")

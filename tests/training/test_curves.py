"""The short form of benchmarks/curves.py: the real train.py, moved between meshes and processes on
its way, draws one curve."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import curves

STEPS = 12
MOVED = (
    curves.Place(4, (("data", 1), ("fsdp", 2), ("tensor", 2))),
    # the stage border and its conversion fall in here
    curves.Place(4, (("data", 2), ("fsdp", 2)), processes=2),
    curves.ONE,
)


@pytest.mark.slow
def test_a_run_that_is_killed_and_moved_twice_has_the_losses_and_parameters_of_one_device(tmp_path):
    recipe = curves.recipe(tmp_path, STEPS, stages=2)
    for name, places in (("one", (curves.ONE,)), ("moved", MOVED)):
        curves.run(places, recipe, tmp_path / name, STEPS)
    one, moved = (curves.losses(tmp_path / name) for name in ("one", "moved"))
    assert len(one) == STEPS and len(set(one)) == STEPS
    np.testing.assert_allclose(moved, one, rtol=1e-4)
    _, worst, where = curves.difference(
        *(curves.parameters(tmp_path / name) for name in ("one", "moved"))
    )
    assert worst < 1e-4, where
    logs = [(tmp_path / f"moved.{number}.log").read_text() for number in (1, 2)]
    assert all("going on at stage" in log for log in logs) and "reparameterization:" in logs[0]

"""benchmarks/interruptions.py in short: runs killed at random moments, and moved between meshes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from benchmarks import interruptions
from benchmarks.interruptions import ONE, Place


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(
    root, tmp_path, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", "")
    command = [sys.executable, root / "benchmarks" / "interruptions.py", "train"]
    command += ["--kills", "4", "--steps", "8", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    # the first line has the seed
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "ended equal to the bit" in done.stdout


@pytest.mark.slow
def test_a_run_that_is_killed_and_moved_twice_has_the_losses_and_parameters_of_one_device(tmp_path):
    moved = (
        Place(4, mesh=(("data", 1), ("fsdp", 2), ("tensor", 2))),
        # the stage border and its conversion fall in here
        Place(4, 2, (("data", 2), ("fsdp", 2))),
        ONE,
    )
    recipe = interruptions.recipe(tmp_path, (6, 6))
    for name, places in (("one", (ONE,)), ("moved", moved)):
        interruptions.run(places, recipe, tmp_path / name, 12)
    one, other = (interruptions.losses(tmp_path / name) for name in ("one", "moved"))
    assert len(one) == 12 and len(set(one)) == 12
    np.testing.assert_allclose(other, one, rtol=1e-4)
    parameters = [interruptions.parameters(tmp_path / name) for name in ("one", "moved")]
    _, worst, where = interruptions.difference(*parameters)
    assert worst < 1e-4, where
    logs = [(tmp_path / f"moved.{number}.log").read_text() for number in (1, 2)]
    assert all("going on at stage" in log for log in logs) and "reparameterization:" in logs[0]

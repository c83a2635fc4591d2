"""Eight simulated devices compute what one does, and hold an eighth of it each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loss_curve_on_eight_devices_is_that_of_one(tmp_path, accumulate):
    program = Path(__file__).parent / "on_eight_devices.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path, str(accumulate)], capture_output=True, text=True, timeout=1800,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    one, _, whole = result["one"]
    for name in ("eight", "mixed"):
        losses, replicated, held = result[name]
        np.testing.assert_allclose(losses, one, rtol=1e-5)
        assert replicated == []
        parts = {"eight": 8, "mixed": 4}[name]
        assert len(held) == 8 and max(held) < whole[0] / parts * 1.1
    assert one[-1] != one[0]

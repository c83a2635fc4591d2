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
@pytest.mark.parametrize(("accumulate", "data", "fsdp"), [(1, 1, 8), (2, 2, 4)])
def test_the_loss_curve_on_eight_devices_is_that_of_one(tmp_path, accumulate, data, fsdp):
    program = Path(__file__).parent / "on_eight_devices.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path, str(accumulate), str(data)],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    one, _, whole = result["one"]
    losses, replicated, held = result["eight"]
    np.testing.assert_allclose(losses, one, rtol=1e-5)
    assert len(set(one)) == len(one)
    assert replicated == []
    assert len(held) == 8 and max(held) < whole[0] / fsdp * 1.1

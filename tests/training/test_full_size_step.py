"""XL/2 at full size takes a train step on a small machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.slow
def test_a_full_size_step_at_256_px_takes_less_than_14_gib(whole_memory):
    """fp32, AdamW and EMA (20 bytes a parameter, 11.4 GiB, with gradients), batch 1, remat
    'full'."""
    program = Path(__file__).parent / "full_size_step.py"
    done = subprocess.run(
        [sys.executable, program, "0.9999"],
        capture_output=True,
        text=True,
        timeout=3000,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["parameters"] == 610_856_096
    assert np.isfinite(found["losses"]).all()
    assert found["peak"] < 14 * 2**30, f"{found['peak'] / 2**30:.2f} GiB"

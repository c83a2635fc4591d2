"""The script that kills a run again and again, in short: benchmarks/interruptions.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(root, tmp_path):
    command = [
        sys.executable,
        root / "benchmarks" / "interruptions.py",
        "--kills",
        "4",
        "--steps",
        "8",
        "--workdir",
        tmp_path,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1800, env={**os.environ, "XLA_FLAGS": ""}
    )
    # the first line has the seed
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "every run ended equal to the bit" in done.stdout

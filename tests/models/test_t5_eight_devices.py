"""The T5 encoder over a mesh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results() -> dict:
    program = Path(__file__).parent / "t5_on_eight_devices.py"
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("quantization", ["None", "int8"])
def test_the_states_on_eight_devices_are_those_of_one(results, quantization):
    assert results[quantization]["error"] <= 1e-5


@pytest.mark.parametrize("quantization", ["None", "int8"])
def test_each_of_eight_devices_holds_an_eighth_and_nothing_large_is_whole_on_all(
    results, quantization
):
    assert results[quantization]["replicated"] == []
    # The embedding lies over fsdp alone, a quarter a device; relative bias, norms and scales are
    # small.
    assert results[quantization]["held"] < results[quantization]["all"] / 8 * 1.2


def test_int8_kernels_are_gathered_as_int8(results):
    assert results["None"]["gathered"] == ["f32"]
    assert results["int8"]["gathered"] == ["s8"]

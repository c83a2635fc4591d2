"""The predicted memory beside what a real run takes on 8 simulated devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from planning import small_run

from pixart_jax.planning import topology
from pixart_jax.planning.compilation import CompileLimits, compiled
from pixart_jax.planning.target import PlanTarget

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp, remat", [(8, "full"), (2, "full")])
def test_predicted_bytes_are_within_ten_percent_of_what_the_process_grows_by(
    fsdp, remat, monkeypatch, tmp_path
):
    """State and batch of about 250 MB (fsdp 8) or 950 MB (fsdp 2: four copies), activations of 400
    to 600 MB, all devices together."""
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path))
    config, count = small_run.get_config(remat=remat), small_run.DEVICES
    where, mesh = topology.parse(f"cpu:{count}"), (count // fsdp, fsdp, 1, 1)
    facts = compiled(PlanTarget(where, config, 0, mesh, small_run.BUCKET), CompileLimits())
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    command = [sys.executable, HERE / "measured_step.py", str(fsdp), remat]
    how = {"capture_output": True, "text": True, "timeout": 900, "env": environment}
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    predicted = facts.total * count
    assert abs(measured["loss"] - 1) < 0.2
    assert abs(measured["grown"] - predicted) < 0.1 * predicted, (
        f"{predicted / 2**20:.0f} MiB, {measured['grown'] / 2**20:.0f} MiB"
    )
    state = sum(facts.counted.values()) * count
    assert abs(measured["arrays"] - state) < 0.1 * state

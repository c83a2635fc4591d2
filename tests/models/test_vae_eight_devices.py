"""The autoencoder on a mesh: each device decodes its own images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_on_an_fsdp_mesh_kernels_are_gathered_and_images_never():
    program = Path(__file__).parent / "vae_on_eight_devices.py"
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gathered"] and set(found["gathered"]) <= set(found["kernels"]), found

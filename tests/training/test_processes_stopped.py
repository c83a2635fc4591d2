"""A run of two processes of which one alone is told to stop: both save the same step and say so,
and the same command goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run
from test_processes_killed import processes, saved, start

from pixart_jax.training.metrics import read

pytestmark = pytest.mark.slow


def test_one_process_is_told_to_stop_and_both_save_the_step_that_none_has_passed(root, tmp_path):
    tiny_run.curriculum(tmp_path / "world")
    recipe, workdir = tmp_path / "world" / "long.py", tmp_path / "run"
    here = Path(tiny_run.__file__).parent
    recipe.write_text(
        "import dataclasses, sys\nfrom pathlib import Path\nsys.path.insert(0, "
        f"{str(here)!r})\nfrom tiny_run import curriculum\n\n\n"
        f"def get_config():\n    config = curriculum(Path({str(tmp_path / 'world')!r}))\n"
        "    stage = dataclasses.replace(config.stages[0], steps=100_000)\n"
        "    return dataclasses.replace(config, stages=(stage,), checkpoint_every=50_000)\n"
    )
    launcher = start(root, recipe, workdir)
    deadline = time.monotonic() + 400
    while len(read(workdir / "metrics.jsonl")) < 5:
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[0][
            -4000:
        ]
        time.sleep(0.1)
    os.kill(processes(launcher)[1], signal.SIGTERM)
    out, _ = launcher.communicate(timeout=400)
    assert launcher.returncode == 75, out[-4000:]
    step = saved(workdir)
    # nothing that was done is lost
    assert step >= 5 and read(workdir / "metrics.jsonl")[-1]["total_step"] == step
    said = [line for line in out.splitlines() if "stopped by SIGTERM: " in line]
    assert len(said) == 2 and all(
        f"stage pixels, step {step} of 100000 is saved; the same command goes on" in line
        for line in said
    )
    assert "Traceback" not in out

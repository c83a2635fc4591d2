"""A run of two processes of which one dies, hangs or is told to stop: the other says so and ends,
and the same command ends with the same bits."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_run

from pixart_jax.parallel.processes import PEER_LOST
from pixart_jax.training.metrics import read

pytestmark = pytest.mark.slow
# patience: far above what a busy machine makes a process wait for its turn
STEPS, EVERY, PATIENCE = 40, 5, 15


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_run.curriculum(folder)
    return tiny_run.recipe(folder, STEPS, EVERY)


def start(root: Path, recipe: Path, workdir: Path, patience: int = 60) -> subprocess.Popen:
    launcher = "-m pixart_jax launch --processes 2 --devices-per-process 2 --patience".split()
    flags = ["--workdir", workdir, "--mesh.fsdp", "2", "--peer-timeout", PATIENCE]
    command = [sys.executable, *launcher, patience, "--", "train.py", recipe, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=root, **pipes)


def wait_for(launcher: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        ended = launcher.poll() is not None or time.monotonic() > deadline
        assert not ended, launcher.communicate()[0][-4000:]
        time.sleep(0.01)


def processes(launcher: subprocess.Popen) -> dict[int, int]:
    """Index → pid."""
    found = {}
    for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
        environment = Path(f"/proc/{pid}/environ").read_text()
        found[int(re.search(r"JAX_PROCESS_ID=(\d+)", environment)[1])] = int(pid)
    return found


def saved(workdir: Path) -> int:
    steps = [int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdigit()]
    return max(steps, default=0)


def struck(
    launcher: subprocess.Popen, workdir: Path, index: int, number: int, step: int
) -> tuple[int, str, float]:
    """(status, output, seconds from the blow to the end) of a run of which one process is struck
    once ``step`` is saved."""
    wait_for(launcher, lambda: saved(workdir) >= step)
    os.kill(processes(launcher)[index], number)
    began = time.monotonic()
    output, _ = launcher.communicate(timeout=200)
    return launcher.returncode, output, time.monotonic() - began


def figures(workdir: Path) -> list[tuple]:
    lines = read(workdir / "metrics.jsonl")
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def state(workdir: Path):
    """The last save, as numpy arrays whatever devices it was made on."""
    folder = workdir / "checkpoints" / str(STEPS) / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, restore_args=how)


def test_one_of_two_processes_hung_and_then_killed_and_the_run_ends_with_the_same_bits(
    root, recipe, tmp_path
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run = start(root, recipe, whole)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0, output

    run = start(root, recipe, broken, 3)
    status, output, seconds = struck(run, broken, 1, signal.SIGSTOP, EVERY)
    assert status == PEER_LOST, output
    assert "error: process 1 of 2 has not answered for" in output and "the same command" in output
    # the launcher does away with the hung one
    assert "still at work" in output and seconds < PATIENCE + 3 + 30

    reached = saved(broken)
    assert EVERY <= reached < STEPS
    run = start(root, recipe, broken)
    status, output, _ = struck(run, broken, 0, signal.SIGKILL, reached + EVERY)
    assert status == 128 + signal.SIGKILL and "launch: process 0 was killed by SIGKILL" in output
    assert "error: process 0 of 2, the coordinator at localhost" in output and "is gone" in output

    assert saved(broken) < STEPS
    run = start(root, recipe, broken)
    output, _ = run.communicate(timeout=600)
    assert run.returncode == 0 and "going on at stage pixels" in output, output
    assert figures(broken) == figures(whole) and len(figures(whole)) == STEPS
    jax.tree.map(np.testing.assert_array_equal, state(whole), state(broken))
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (whole / "model" / name).read_bytes() == (broken / "model" / name).read_bytes()


def test_one_process_is_asked_to_stop_and_both_save_the_step_that_none_has_passed(root, tmp_path):
    tiny_run.curriculum(tmp_path / "world")
    workdir, recipe = tmp_path / "run", tiny_run.recipe(tmp_path / "world", 100_000, 50_000)
    launcher = start(root, recipe, workdir)
    wait_for(launcher, lambda: len(read(workdir / "metrics.jsonl")) >= 5)
    os.kill(processes(launcher)[1], signal.SIGTERM)
    out, _ = launcher.communicate(timeout=400)
    assert launcher.returncode == 75, out[-4000:]
    step = saved(workdir)
    # nothing that was done is lost
    assert step >= 5 and read(workdir / "metrics.jsonl")[-1]["total_step"] == step
    message = f"stopped by SIGTERM: stage pixels, step {step} of 100000 is saved; the same command"
    assert out.count(message) == 2 and "Traceback" not in out

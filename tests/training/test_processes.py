"""Several processes: each reads its own rows, and the model is written from parameters that none of
them holds whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import over_processes

from pixart_jax.weights.component import Transformer

PROGRAM = Path(__file__).parent / "over_processes.py"


def started(processes: int, devices: int, *argv) -> subprocess.CompletedProcess:
    launch = f"-m pixart_jax launch --processes {processes} --devices-per-process {devices} --"
    command = [sys.executable, *launch.split(), PROGRAM, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def launch(processes: int, devices: int, *argv) -> list[dict]:
    """What each process printed as JSON."""
    done = started(processes, devices, *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "] {" in line]
    return [json.loads(line.split("] ", 1)[1]) for line in sorted(lines)]


@pytest.mark.slow
def test_each_process_reads_the_rows_of_its_devices_and_all_rows_are_read():
    found = [output["rows"] for output in launch(4, 2, "rows")]
    assert len(found) == 4
    every = list(range(over_processes.SIZE))
    for sizes in found[0]:
        rows = [output[sizes] for output in found]
        assert set().union(*rows) == set(every), sizes
        assert all(row == sorted(set(row)) for row in rows), sizes
    for sizes in ("data=8", "fsdp=8", "tensor=2"):
        quarters = [every[4 * k : 4 * k + 4] for k in range(4)]
        assert [output[sizes] for output in found] == quarters, sizes
    # Fewer batch shards than processes: the same rows on several.
    assert [output["data=2,tensor=-1"] for output in found] == [every[:8]] * 2 + [every[8:]] * 2
    for sizes in ("tensor=8", "data=1,context=-1"):
        assert all(output[sizes] == every for output in found), sizes


@pytest.mark.slow
def test_an_export_from_many_processes_is_the_one_of_one_to_the_bit_and_never_holds_the_whole(
    tmp_path,
):
    outputs = launch(2, 2, "export", tmp_path)
    Transformer(over_processes.MODEL, over_processes.parameters()).save(tmp_path / "one")
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "null_caption.safetensors"):
        sharded, one = (tmp_path / folder / name for folder in ("sharded", "one"))
        assert sharded.read_bytes() == one.read_bytes(), name
    assert not list(tmp_path.glob("*/.*.part"))
    for process in outputs:
        # A layer's largest tensor is 4 MiB, its gathered copies on two devices and its transposed
        # one a few of that.
        assert process["grown"] < 48 << 20 < process["total"] / 2, process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("config", "process 1 was started with another config than process 0"),
        ("folder", "is not shared: process"),
    ],
)
def test_processes_with_different_configs_or_folders_are_refused(tmp_path, what, line):
    done = started(2, 1, "agree", tmp_path, what)
    assert done.returncode == 2, done.stderr
    assert line in done.stderr and "error: process 1 of 2 has ended with status 2" in done.stderr


def test_rows_that_the_mesh_does_not_divide_are_refused():
    import jax

    from pixart_jax.config import MeshConfig
    from pixart_jax.errors import UserError
    from pixart_jax.parallel.mesh import make_mesh
    from pixart_jax.parallel.rules import batch_sharding
    from pixart_jax.training.batches import rows_of

    sharding = batch_sharding(make_mesh(MeshConfig(), jax.devices()[:1]))
    np.testing.assert_array_equal(rows_of(sharding, 5), range(5))
    fake = type("Sharding", (), {"mesh": type("Mesh", (), {"shape": {"data": 2, "fsdp": 2}})()})()
    with pytest.raises(UserError, match="batch size 6 does not cut into 4"):
        rows_of(fake, 6)

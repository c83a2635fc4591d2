"""Runs whose workdir lies in a bucket, against stores on loopback."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from pixart_jax import files
from pixart_jax.commands.train import train
from pixart_jax.errors import UserError
from pixart_jax.training import bucket, bucket_lock, metrics
from pixart_jax.training.checkpoint import Checkpointer
from pixart_jax.training.workdir import Workdir
from tests.training import test_checkpoint, tiny_run
from tests.training.test_workdir import CONFIG

LIVES = Path(__file__).parent / "lives.py"
pytestmark = pytest.mark.skipif(
    ocp.__version__ not in bucket.TESTED, reason="another version of Orbax"
)


@functools.cache
def config_of(folder: Path, steps: int):
    config = tiny_run.curriculum(folder, checkpoint_every=2)
    stage = dataclasses.replace(config.stages[0], steps=steps)
    preview = dataclasses.replace(config.preview, steps=1)
    return dataclasses.replace(config, stages=(stage,), preview=preview)


def final_state(workdir: str | Path, total: int):
    folder = files.stage(files.join(workdir, "checkpoints", str(total)))
    reader = ocp.PyTreeCheckpointer()
    arrays = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        reader.metadata(folder / "state").item_metadata.tree,
    )
    return reader.restore(folder / "state", restore_args=arrays)  # of any number of processes


def figures(workdir: str | Path) -> list[dict]:
    lines = metrics.read(files.stage(files.join(workdir, "metrics.jsonl")))
    return [{k: v for k, v in line.items() if k not in metrics.TIMING} for line in lines]


def assert_equal_runs(one, other, total: int) -> None:
    """The same losses, parameters and moments, to the bit."""
    assert figures(one) == figures(other)
    states = [jax.tree.leaves(final_state(run, total)) for run in (one, other)]
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Short leases, and caches of this test's own."""
    monkeypatch.setenv("PIXART_JAX_LEASE_SECONDS", "2")
    monkeypatch.setenv("PIXART_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bucket_lock, "LEASE_SECONDS", 2.0)


@pytest.mark.parametrize("kind", ["s3", pytest.param("gs", marks=pytest.mark.slow)])
def test_a_workdir_in_a_bucket_goes_on_from_its_last_commit(kind, request, small):
    store = request.getfixturevalue(kind)
    address = store.root + "/run"

    def life(steps: int) -> Workdir:
        """Steps to this one, checkpoints at the even ones; the folder, still open."""
        folder = Workdir(address, CONFIG).__enter__()
        folder.save_config()
        saving = (folder.checkpoints, 1, 4, folder.bucket)  # the newest, and each multiple of 4
        with Checkpointer(*saving) as checkpoints:
            begun = checkpoints.latest_position().total
            if begun:
                restored = checkpoints.restore(begun, test_checkpoint.abstract())
                test_checkpoint.assert_equal(restored, test_checkpoint.make(begun))
            with metrics.Metrics(folder.path, begun) as log:
                for total in range(begun + 1, steps + 1):
                    log.write("stage", total, total, {"loss": 1 / total})
                    if total % 2 == 0:
                        checkpoints.save(test_checkpoint.at(total), test_checkpoint.make(total))
        return folder

    killed = life(5).bucket
    killed._closed.set(), killed._lock._released.set()
    # as if the process had been killed: its checkpoint 6 has no mark, its lock stays
    files.put(address + "/checkpoints/6/state/half", b"")
    files.put(address + "/checkpoints/5/" + bucket.MARK, b"")  # of one that had lost the lock
    lock = json.loads(files.read_bytes(address + "/.lock"))
    files.put(address + "/.lock", json.dumps({**lock, "started": "0"}).encode())
    logged = [line["total_step"] for line in figures(address)]
    assert logged[:4] == [1, 2, 3, 4]  # whatever came after the commit may be missing
    counts, commit = [], bucket.Bucket.commit

    def counted(self, *args):
        commit(self, *args)
        counts.append(store.proxy.requests.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucket.Bucket, "commit", counted)
        with pytest.warns(match="checkpoint 5 was written by a process that had lost its lock"):
            life(8).__exit__(None, None, None)
    assert [line["total_step"] for line in figures(address)] == [*range(1, 9)]
    names = [e.address.removeprefix(address + "/") for e in files.list_files(address)]
    kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert kept == {"4", "6", "8"} and "config.json" in names
    # a checkpoint every 10 minutes, the lock every 30 s, two logs a minute; deletions are free
    save = counts[-1] - counts[-2]
    hour = 6 * (save.total() - save["DELETE"]) + 120 + 2 * 60
    print(f"{kind}: requests of a checkpoint {dict(save)}, billed in an hour {hour}")
    assert hour < 1_100
    with pytest.raises(UserError, match="holds another config: seed was 0, now 1"):
        Workdir(address, dataclasses.replace(CONFIG, seed=1)).__enter__()


def test_orbax_writes_a_small_file_though_an_answer_was_lost(gs):
    bucket.prepare_orbax(gs.root)
    gs.proxy.losing, before = "POST /upload", gs.proxy.requests["POST"]
    file = epath.Path(gs.root) / "folder" / "small"
    file.write_text("data")
    assert not gs.proxy.losing and file.read_text() == "data"
    assert gs.proxy.requests["POST"] == before + 2  # one file, one request
    file.write_text("")
    assert file.exists() and not file.read_text()


@pytest.mark.slow
def test_a_killed_run_in_a_bucket_goes_on_and_ends_as_a_local_one(s3, small, tmp_path, capsys):
    config = config_of(tmp_path, steps=5)
    address = s3.root + "/run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_run.kill_before(patch, 4)
        with pytest.raises(tiny_run.Killed):
            train(config, address)
    # what a killed process leaves: a checkpoint without its mark, and one of a lost lock
    kept = {e.address.split("/")[5] for e in files.list_files(address + "/checkpoints")}
    assert kept == {"2"}
    files.put(address + "/checkpoints/4/state/half", b"")
    files.put(address + "/checkpoints/3/" + bucket.MARK, b"")
    lines = [line for line in figures(address) if line["total_step"] <= 2]
    files.put(address + "/unrelated.txt", b"stays")
    with pytest.warns(match="checkpoint 3 was written by a process that had lost its lock"):
        train(config, address)
    assert f"done: {address}/model" in capsys.readouterr().out
    assert figures(address)[: len(lines)] == lines

    train(config, tmp_path / "local")
    assert_equal_runs(tmp_path / "local", address, 5)
    names = {e.address.removeprefix(address + "/") for e in files.list_files(address)}
    local = {str(p.relative_to(tmp_path / "local")) for p in (tmp_path / "local").rglob("*")}
    for name in ("config.json", "attempts.jsonl", "ledger.json", "loss.png", "data.json"):
        assert name in names and name in local
    exported = {name for name in local if name.startswith(("model/", "samples/")) and "." in name}
    assert exported <= names and exported


def started(argv: list, **environment: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], env={**os.environ, **environment}, **pipes
    )


def wait_for(condition, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


CLOUD = ["aiobotocore", "boto3", "botocore", "gcsfs", "google.cloud.storage", "s3fs"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """steps → (recipe, the workdir of a local run that nothing interrupted)."""
    folder = tmp_path_factory.mktemp("tiny")

    @functools.cache
    def run(steps: int):
        tiny_run.curriculum(folder)
        recipe = tiny_run.recipe(folder, steps=steps, every=2)
        # none of them can be imported; tensorboardX tries to
        code = (
            f"import sys; sys.modules.update(dict.fromkeys({CLOUD})); from pixart_jax import cli; "
            "from pixart_jax.commands import train; sys.exit(cli.run(train.main))"
        )
        process = started(["-c", code, recipe, "--workdir", folder / f"local-{steps}"])
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
        return recipe, folder / f"local-{steps}"

    return run


def kill_and_compare(store, uninterrupted, name: str, kills: int, steps: int) -> None:
    recipe, local = uninterrupted(steps)
    address = f"{store.root}/{name}"
    process = started([LIVES, 7, kills, recipe, "--workdir", address])
    out, _ = process.communicate(timeout=7200)
    assert process.returncode == 0, out[-6000:]
    summary = out.strip().splitlines()[-1]
    attempts = metrics.read(files.stage(address + "/attempts.jsonl"))
    begun = sorted({line["total_step"] for line in attempts})
    print(f"{summary}; lives began at steps {begun}")
    assert f"killed {kills} times; ended by themselves: []" in summary, out[-6000:]
    assert len(begun) > kills // 10  # some were killed only after a commit
    assert_equal_runs(local, address, steps)


@pytest.mark.slow
def test_a_hundred_kills_on_s3_change_nothing(s3, small, uninterrupted):
    kill_and_compare(s3, uninterrupted, "kills", int(os.environ.get("KILLS", 100)), 240)


@pytest.mark.slow
def test_twenty_kills_on_gs_change_nothing(gs, small, uninterrupted):
    kill_and_compare(gs, uninterrupted, "kills", int(os.environ.get("GS_KILLS", 20)), 60)


@pytest.mark.slow
def test_a_store_that_fails_one_request_in_twenty_changes_nothing(store, small, uninterrupted):
    store.proxy.faults = 0.05
    try:
        kill_and_compare(store, uninterrupted, "faults", 8, 20)
    finally:
        store.proxy.faults = 0.0


@pytest.mark.slow
def test_a_second_writer_ends_at_once_with_one_line(store, small, uninterrupted):
    recipe, _ = uninterrupted(60)
    address = store.root + "/two"
    argv = [LIVES.parents[2] / "train.py", recipe, "--workdir", address]
    first = started([*argv, "--scratch", Path(recipe).parent / "scratch"])
    wait_for(lambda: files.exists(address + "/config.json"))
    second = started([*argv, "--scratch", Path(recipe).parent / "other"])
    out, _ = second.communicate(timeout=120)
    assert second.returncode == 2, out
    (line,) = [line for line in out.splitlines() if line.startswith("error:")]
    assert "is in use by another run" in line
    out, _ = first.communicate(timeout=600)
    assert first.returncode == 0, out


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_holder_frozen_in_its_commit_commits_nothing_that_counts(
    store, small, uninterrupted, when
):
    recipe, local = uninterrupted(20)
    address = f"{store.root}/frozen-{when}"
    argv = [recipe, "--workdir", address, "--scratch"]
    frozen = started([LIVES, f"freeze:{when}:4", *argv, Path(recipe).parent / "a"])
    try:
        stat = Path(f"/proc/{frozen.pid}/stat")
        wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
        # takes the lock over, goes on from step 2, and is killed before it saves step 4
        killer = LIVES.with_name("train_until_killed.py")
        other = started([killer, "2", *argv, Path(recipe).parent / "b"])
        out, _ = other.communicate(timeout=300)
        assert other.returncode == -signal.SIGKILL and "waiting for a sign of life" in out, out
    finally:
        frozen.send_signal(signal.SIGCONT)
    out, _ = frozen.communicate(timeout=300)
    assert frozen.returncode == 75, out
    assert "was taken over by another process" in out, out
    marks = {e.address for e in files.list_files(address) if e.address.endswith(bucket.MARK)}
    late = f"{address}/checkpoints/4/{bucket.MARK}" in marks
    assert late == (when == "after")
    last = started([LIVES.parents[2] / "train.py", *argv, Path(recipe).parent / "c"])
    out, _ = last.communicate(timeout=600)
    assert last.returncode == 0, out
    assert ("checkpoint 4 was written by a process that had lost its lock" in out) == late
    assert_equal_runs(local, address, 20)


def outage(s3, process: subprocess.Popen, address: str) -> None:
    """Begin an outage once the run has checkpoints."""
    wait_for(lambda: len(files.list_files(address + "/checkpoints")) > 30)
    assert process.poll() is None
    s3.proxy.faults = 1.0


@pytest.mark.slow
def test_an_outage_is_survived_or_ends_in_one_line_with_status_75(s3, small, uninterrupted):
    recipe, local = uninterrupted(60)
    for name, seconds in (("short", 3.0), ("long", None)):
        address = f"{s3.root}/{name}"
        argv = [LIVES.parents[2] / "train.py", recipe, "--workdir", address]
        process = started(argv, PIXART_JAX_RETRY_SECONDS="8")
        try:
            outage(s3, process, address)
            if seconds is not None:
                time.sleep(seconds)
                s3.proxy.faults = 0.0
            out, _ = process.communicate(timeout=300)
        finally:
            s3.proxy.faults = 0.0
        if seconds is None:
            assert process.returncode == 75, out
            (line,) = [line for line in out.splitlines() if line.startswith("error:")]
            print(line)
            assert "Traceback" not in out, out
            process = started(argv)
            out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
        assert_equal_runs(local, address, 60)


@pytest.mark.slow
def test_two_processes_in_a_bucket_are_killed_and_go_on_as_in_a_folder(store, small, uninterrupted):
    recipe, _ = uninterrupted(20)
    launch = ["-m", "pixart_jax", "launch", "--processes", "2", "--devices-per-process", "1", "--"]
    local, address = Path(recipe).parent / f"two-{store.scheme}", f"{store.root}/processes"
    program = [recipe, "--mesh", "fsdp=2", "--workdir"]
    for command, status in (
        ([*launch, LIVES.parents[2] / "train.py", *program, local], 0),
        ([*launch, LIVES.with_name("train_until_killed.py"), "7", *program, address], None),
        ([*launch, LIVES.parents[2] / "train.py", *program, address], 0),
    ):
        process = started(command)
        out, _ = process.communicate(timeout=600)
        assert process.returncode == status or (status is None and process.returncode), out
    assert "going on at stage" in out
    assert_equal_runs(local, address, 20)

"""Metrics of a run: on disk, and what they say of time and memory."""

from __future__ import annotations

import errno
import json
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from pixart_jax.errors import UserError
from pixart_jax.models.flops import train_flops
from pixart_jax.training import metrics
from pixart_jax.training.metrics import Metrics, RestartLog, read
from pixart_jax.training.run import StageHooks
from tests.training import tiny_run


def events(file):
    """The protocol buffers of an event file: 8 bytes of length, 4 of its checksum, the event, 4 of
    its checksum."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length


def test_the_event_file_holds_every_figure_and_picture_and_takes_back_what_a_killed_run_wrote(
    tmp_path,
):
    with Metrics(tmp_path, 5) as log:
        log.write("a", 6, 6, {"loss": 0.5})
        log.image("drawn", np.full((4, 6, 3), 200, np.uint8), 6)
        (file,) = tmp_path.glob("events.out.tfevents.*")
        version, start, loss, drawn = events(file)  # already there, though the run goes on
    assert version.file_version == "brain.Event:2"
    assert start.step == 6 and start.session_log.status == 1
    value, image = loss.summary.value[0], drawn.summary.value[0].image
    assert (loss.step, value.tag, value.simple_value) == (6, "a/loss", 0.5)
    assert (drawn.step, image.height, image.width) == (6, 4, 6)
    assert image.encoded_image_string[:4] == b"\x89PNG"


def wandb_history(folder):
    """The values of each offline run under ``folder``, oldest first: one dict a logged line. A
    .wandb file is a LevelDB log: 7 bytes, then blocks of 32 KiB with checksum, length, kind, data.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its service may still be writing the end of a finished run
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, lines, record = file.read_bytes(), 7, [], b""
        while at + 7 <= len(data):
            _, length, kind = struct.unpack_from("<IHB", data, at)
            if kind == 0:  # the rest of a block is padding
                at += 32768 - at % 32768
                continue
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or last part
                items, record = Record.FromString(record).history.item, b""
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                lines += [values] if values else []
        yield lines


def test_weights_and_biases_gets_the_same_values_and_one_run_over_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start in (0, 2):  # the first process was killed after step 3; its checkpoint has 2
        with Metrics(tmp_path, start, "project", {"seed": 3}) as log:
            for step in range(start + 1, start + 4):
                log.write("a", step, step, {"loss": 1 / step})
            log.image("preview", np.zeros((4, 6, 3), np.uint8), step)
    first, second = wandb_history(tmp_path)
    losses = [(line["total_step"], line["a/loss"]) for line in second if "a/loss" in line]
    assert losses == [(3, 1 / 3), (4, 1 / 4), (5, 1 / 5)]
    assert [line["total_step"] for line in first] == [1, 2, 3, 3]
    assert second[-1]["preview/width"] == 6
    (name,) = {f.name for f in tmp_path.glob("wandb/offline-run-*/*.wandb")}  # the id is in it
    assert (tmp_path / "wandb_id").read_text() in name


def test_weights_and_biases_without_a_login_is_one_line(tmp_path, monkeypatch):
    import wandb

    wandb.teardown()  # it reads its settings once a process
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"Weights & Biases: .*; `wandb login`, WANDB_MODE=offline"):
        Metrics(tmp_path, 0, "project")


def test_weights_and_biases_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'pip install "pixart-jax\[wandb\]"'):
        Metrics(tmp_path, 0, "project")


@pytest.mark.parametrize("full", ["_lines", "_events"])
def test_a_full_disk_is_an_error_of_the_step_and_never_hides_why_a_run_ended(tmp_path, full):
    """/dev/full refuses every write as a full disk does."""

    def fill(log):
        if full == "_lines":
            log._lines = open("/dev/full", "a")
        else:
            log._events._py_recordio_writer._writer = open("/dev/full", "wb")

    for name in "ab":
        (tmp_path / name).mkdir()
    with pytest.raises(OSError) as error, Metrics(tmp_path / "a", 0) as log:
        fill(log)
        log.write("a", 1, 1, {"loss": 0.5})
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="its own reason"), Metrics(tmp_path / "b", 0) as log:
        fill(log)
        log._lines.write("what is still to be written when the run ends")
        log._events._write_serialized_event(b"likewise")
        raise RuntimeError("its own reason")


def test_lines_beyond_the_restored_step_are_taken_back_and_a_cut_line_with_them(tmp_path):
    with Metrics(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write("a", step, step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "a", "st')
    with Metrics(tmp_path, 2) as log:
        log.write("b", 1, 3, {"loss": 9.0})
    names = ("stage", "step", "total_step", "loss")
    rows = [("a", 1, 1, 1.0), ("a", 2, 2, 2.0), ("b", 1, 3, 9.0)]
    assert read(tmp_path / "metrics.jsonl") == [dict(zip(names, row)) for row in rows]


def test_the_loss_curve_draws_each_stage_in_its_colour(tmp_path):
    points = [
        {"stage": s, "total_step": i + 10 * (s == "b"), "loss": 1 / (i + 1)}
        for s in "ab"
        for i in range(10)
    ]
    metrics.write_loss_curve(tmp_path / "loss.png", points)
    sheet = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (sheet == colour).all(-1).sum() > 100
    metrics.write_loss_curve(tmp_path / "empty.png", [])
    assert (tmp_path / "empty.png").exists()


class Time:
    """A clock that moves by calls of ``passes`` alone."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        fake = types.SimpleNamespace(perf_counter=lambda: self.now, time=lambda: self.now)
        monkeypatch.setattr(metrics, "time", fake)

    def passes(self, seconds):
        self.now += seconds


def test_rates_leave_out_saves_compiling_and_the_first_step_and_productive_time_only_the_first_two(
    monkeypatch,
):
    time, flops = Time(monkeypatch), 5e9
    timer = metrics.StepTimer(batch_size=8, productive=100.0, peak=1e10)
    time.passes(3.0)
    timer.exclude(2.5)
    timer.done(flops)  # the first step: half a second beside its compiling
    assert timer.rates() == {} and timer.productive == pytest.approx(100.5)
    for _ in range(4):
        with timer.waiting():
            time.passes(0.25)
        time.passes(0.75)
        timer.done(flops)
        with timer.paused():
            time.passes(60.0)
    assert timer.rates() == pytest.approx(
        {"steps_per_second": 1.0, "images_per_second": 8.0, "data_wait": 0.25, "mfu": 0.5}
    )
    assert timer.productive == pytest.approx(104.5)
    assert "mfu" not in metrics.StepTimer(8).rates()


def test_goodput_counts_from_the_first_start_whatever_came_between(tmp_path, monkeypatch):
    time, file = Time(monkeypatch), tmp_path / "attempts.jsonl"
    first = RestartLog(tmp_path, 0, 8, "TPU v5 lite")
    time.passes(100.0)
    assert first.goodput(60.0) == pytest.approx(0.6) and first.restarts == 0
    with open(file, "a") as lines:
        lines.write('{"time": 1050.0, "tot')  # killed while it wrote
    time.passes(100.0)
    second = RestartLog(tmp_path, 40, 4, "TPU v5 lite")
    assert second.first == 1000.0 and second.restarts == 1
    time.passes(50.0)
    assert second.goodput(40.0 + 50.0) == pytest.approx(0.36)
    assert [(line["total_step"], line["devices"]) for line in read(file)] == [(0, 8), (40, 4)]
    time.passes(-400.0)  # the clock was set back
    assert second.goodput(90.0) == 1.0


def test_flops_are_those_of_the_whole_batch_at_its_bucket():
    config = tiny_run.MODEL
    batch = {"mean": np.zeros((4, 4, 6, 4)), "text_states": np.zeros((4, 8, 16))}

    def flops(config):
        task = types.SimpleNamespace(module=types.SimpleNamespace(config=config))
        stage = types.SimpleNamespace(batch_size=16, is_adapter=False, unlearned_evaluations=0)
        return StageHooks.flops(types.SimpleNamespace(task=task, stage=stage), batch)

    assert flops(config) == 16 * train_flops(config, 32, 48, 8)
    assert flops(None) == 0


def test_device_memory_is_of_the_fullest_device_of_this_process():
    def device(stats, process=0):
        return types.SimpleNamespace(process_index=process, memory_stats=lambda: stats)

    full = {"bytes_in_use": 2**31, "peak_bytes_in_use": 2**32}
    emptier = {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**30}
    found = metrics.device_memory([device(full), device(emptier), device({}, 1)])
    assert found == {"device_memory_gib": 2.0, "device_memory_peak_gib": 4.0}
    assert metrics.device_memory([device(None)]) == {}


def test_the_summary_has_a_line_for_the_run_and_one_for_each_stage(tmp_path):
    assert metrics.summary(tmp_path) == "nothing was logged"
    RestartLog(tmp_path, 0, 1, "cpu"), RestartLog(tmp_path, 3, 1, "cpu")
    common = {"images_per_second": 10.0, "mfu": 0.5, "data_wait": 0.25, "goodput": 0.75}
    common |= {"device_memory_peak_gib": 3.0, "recompilations": 0}
    rows = [
        {"stage": "a", "step": 5, "total_step": 5, "loss": 0.5, "skipped": 2, **common},
        {"stage": "b", "step": 4, "total_step": 9, "skipped": 4, **common},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rates = "10 images/s, MFU 50.0%, 25.0% waiting for data"
    assert metrics.summary(tmp_path).splitlines() == [
        "9 steps, goodput 75% of the time since the first start, 1 restarts, device memory at "
        "most 3.0 GiB",
        f"  a: 5 steps, loss 0.5, {rates}, 2 steps skipped, 0 recompilations",
        f"  b: 4 steps, {rates}, 4 steps skipped, 0 recompilations",
    ]

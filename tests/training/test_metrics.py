"""Figures of a run, on disk."""

from __future__ import annotations

import errno
import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from pixart_jax.training.metrics import Metrics, loss_curve, read


def lines(folder):
    return [
        (line["stage"], line["step"], line["total_step"], line["loss"])
        for line in read(folder / "metrics.jsonl")
    ]


def test_one_object_a_line_and_events_beside(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(stage="a", step=1, total=1, values={"loss": 0.5, "lr": 1e-3})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "stage": "a",
        "step": 1,
        "total_step": 1,
        "loss": 0.5,
        "lr": 1e-3,
    }
    assert list(tmp_path.glob("events.out.tfevents.*"))


def made(folder):
    folder.mkdir()
    return folder


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
    with Metrics(tmp_path, 5) as metrics:
        metrics.write(stage="a", step=6, total=6, values={"loss": 0.5})
        metrics.image("drawn", np.full((4, 6, 3), 200, np.uint8), 6)
        (file,) = tmp_path.glob("events.out.tfevents.*")
        version, start, loss, drawn = events(file)  # already there, though the run goes on
    assert version.file_version == "brain.Event:2" and (start.step, start.session_log.status) == (
        6,
        1,
    )
    assert (loss.step, loss.summary.value[0].tag, loss.summary.value[0].simple_value) == (
        6,
        "a/loss",
        0.5,
    )
    image = drawn.summary.value[0].image
    assert (drawn.step, image.height, image.width, image.encoded_image_string[:4]) == (
        6,
        4,
        6,
        b"\x89PNG",
    )


@pytest.mark.parametrize("full", ["_lines", "_events"])
def test_a_full_disk_is_an_error_of_the_step_and_never_hides_why_a_run_ended(tmp_path, full):
    """/dev/full refuses every write as a full disk does."""

    def fill(metrics):
        if full == "_lines":
            metrics._lines = open("/dev/full", "a")
        else:
            metrics._events._records._writer = open("/dev/full", "wb")

    with pytest.raises(OSError) as fault, Metrics(made(tmp_path / "a"), 0) as metrics:
        fill(metrics)
        metrics.write(stage="a", step=1, total=1, values={"loss": 0.5})
    assert fault.value.errno == errno.ENOSPC
    with (
        pytest.raises(RuntimeError, match="its own reason"),
        Metrics(made(tmp_path / "b"), 0) as metrics,
    ):
        fill(metrics)
        metrics._lines.write("what is still to be written when the run ends")
        metrics._events._records.write(b"likewise")
        raise RuntimeError("its own reason")


def test_lines_beyond_the_restored_step_are_taken_back_and_a_cut_line_with_them(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        for step in (1, 2, 3):
            metrics.write(stage="a", step=step, total=step, values={"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "a", "st')
    with Metrics(tmp_path, 2) as metrics:
        metrics.write(stage="b", step=1, total=3, values={"loss": 9.0})
    assert lines(tmp_path) == [("a", 1, 1, 1.0), ("a", 2, 2, 2.0), ("b", 1, 3, 9.0)]


def test_the_loss_curve_draws_each_stage_in_its_colour():
    points = [
        {"stage": s, "total_step": i + 10 * (s == "b"), "loss": 1 / (i + 1)}
        for s in "ab"
        for i in range(10)
    ]
    sheet = loss_curve(points)
    assert sheet.shape == (480, 960, 3)
    for colour in ((31, 119, 180), (214, 100, 20)):
        assert (sheet == colour).all(-1).sum() > 100
    assert loss_curve([]).shape == (480, 960, 3)

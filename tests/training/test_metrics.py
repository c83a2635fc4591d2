"""Figures of a run, on disk."""

from __future__ import annotations

import json

from pixart_jax.training.metrics import Metrics, loss_curve, read


def lines(folder):
    return [(line["stage"], line["step"], line["total_step"], line["loss"]) for line in read(folder / "metrics.jsonl")]


def test_one_object_a_line_and_events_beside(tmp_path):
    with Metrics(tmp_path, 0) as metrics:
        metrics.write(stage="a", step=1, total=1, values={"loss": 0.5, "lr": 1e-3})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"stage": "a", "step": 1, "total_step": 1, "loss": 0.5, "lr": 1e-3}
    assert list(tmp_path.glob("events.out.tfevents.*"))


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
    points = [{"stage": s, "total_step": i + 10 * (s == "b"), "loss": 1 / (i + 1)} for s in "ab" for i in range(10)]
    sheet = loss_curve(points)
    assert sheet.shape == (480, 960, 3)
    for colour in ((31, 119, 180), (214, 100, 20)):
        assert (sheet == colour).all(-1).sum() > 100
    assert loss_curve([]).shape == (480, 960, 3)

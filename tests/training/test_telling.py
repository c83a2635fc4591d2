"""What a run tells of its time: rates, waiting, goodput over restarts, MFU."""

from __future__ import annotations

import json
import types

import pytest
from pixart_jax.training.attempts import RestartLog
from pixart_jax.training.summary import summary

from pixart_jax.models.flops import train_flops
from pixart_jax.models.transformer import TransformerConfig
from pixart_jax.training import attempts, clock
from pixart_jax.training.metrics import TIMING, device_memory, read
from pixart_jax.training.stages import batch_flops


class Time:
    """A clock that goes when told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for module in (clock, attempts):
            monkeypatch.setattr(
                module,
                "time",
                types.SimpleNamespace(perf_counter=lambda: self.now, time=lambda: self.now),
            )

    def passes(self, seconds):
        self.now += seconds


def test_rates_leave_out_saves_compiling_and_the_first_step_and_productive_time_only_the_first_two(
    monkeypatch,
):
    time, flops = Time(monkeypatch), 5e9
    watch = clock.StepTimer(batch_size=8, productive=100.0, peak=1e10)
    time.passes(3.0)
    watch.compiled(2.5)
    watch.done(flops)  # the first step: half a second beside its compiling
    assert watch.rates() == {} and watch.productive == pytest.approx(100.5)
    for _ in range(4):
        with watch.waiting():
            time.passes(0.25)
        time.passes(0.75)
        watch.done(flops)
        with watch.paused():
            time.passes(60.0)
    found = watch.rates()
    assert found == pytest.approx(
        {"steps_per_second": 1.0, "images_per_second": 8.0, "data_wait": 0.25, "mfu": 0.5}
    )
    assert watch.productive == pytest.approx(104.5)
    assert "mfu" not in clock.StepTimer(8).rates()


def test_goodput_counts_from_the_first_start_whatever_came_between(tmp_path, monkeypatch):
    time = Time(monkeypatch)
    first = RestartLog(tmp_path, 0, 8, "TPU v5 lite")
    time.passes(100.0)
    assert first.goodput(60.0) == pytest.approx(0.6) and first.restarts == 0
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"time": 1050.0, "tot')  # killed while it wrote
    time.passes(100.0)
    second = RestartLog(tmp_path, 40, 4, "TPU v5 lite")
    assert second.first == 1000.0 and second.restarts == 1
    time.passes(50.0)
    assert second.goodput(40.0 + 50.0) == pytest.approx(0.36)
    assert [
        (line["total_step"], line["devices"]) for line in read(tmp_path / "attempts.jsonl")
    ] == [(0, 8), (40, 4)]


def test_flops_are_those_of_the_whole_batch_at_its_bucket():
    config = TransformerConfig(
        depth=2, width=32, heads=4, caption_width=16, text_tokens=16, sample_size=4
    )
    task = types.SimpleNamespace(module=types.SimpleNamespace(config=config))
    rows = {
        "mean": types.SimpleNamespace(shape=(4, 4, 6, 4)),
        "text_states": types.SimpleNamespace(shape=(4, 8, 16)),
    }
    assert batch_flops(task, 16)(rows) == 16 * train_flops(config, 32, 48, 8)
    assert (
        batch_flops(types.SimpleNamespace(module=types.SimpleNamespace(config=None)), 16)(rows) == 0
    )


def test_device_memory_is_told_where_the_platform_tells_it():
    def device(stats, process=0):
        return types.SimpleNamespace(process_index=process, memory_stats=lambda: stats)

    full, emptier = (
        {"bytes_in_use": 2**31, "peak_bytes_in_use": 2**32},
        {"bytes_in_use": 2**30, "peak_bytes_in_use": 2**30},
    )
    assert device_memory([device(full), device(emptier), device({}, 1)]) == {
        "device_memory_gib": 2.0,
        "device_memory_peak_gib": 4.0,
    }
    assert device_memory([device(None)]) == {}


def test_the_summary_has_a_line_for_the_run_and_one_for_each_stage(tmp_path):
    assert summary(tmp_path) == "nothing was logged"
    RestartLog(tmp_path, 0, 1, "cpu"), RestartLog(tmp_path, 3, 1, "cpu")
    common = {
        "images_per_second": 10.0,
        "mfu": 0.5,
        "data_wait": 0.25,
        "goodput": 0.75,
        "device_memory_peak_gib": 3.0,
        "recompilations": 0,
    }
    rows = [
        {"stage": "a", "step": 5, "total_step": 5, "loss": 0.5, "skipped": 2, **common},
        {"stage": "b", "step": 4, "total_step": 9, "skipped": 4, **common},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert summary(tmp_path).splitlines() == [
        "9 steps, goodput 75% of the time since the first start, 1 restarts, device memory at "
        "most 3.0 GiB",
        "  a: 5 steps, loss 0.5, 10 images/s, MFU 50.0%, 25.0% waiting for data, 2 steps skipped, "
        "0 recompilations",
        "  b: 4 steps, 10 images/s, MFU 50.0%, 25.0% waiting for data, 4 steps skipped, 0 "
        "recompilations",
    ]


def test_what_the_clock_decides_is_listed_in_one_place():
    assert {"images_per_second", "mfu", "goodput", "data_wait", "restarts"} <= set(
        TIMING
    ) and "skipped" not in TIMING

"""The loop around a step, with steps that cost nothing."""

from __future__ import annotations

import types

import jax
import numpy as np
import pytest

from pixart_jax.config import MeshConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.parallel.rules import batch_sharding
from pixart_jax.training.loop import Diverged, Watch, Window, train


class Batches:
    """Batch k holds the number k."""

    plan = types.SimpleNamespace(batch_size=4)

    def iterator(self, start):
        step = start
        while True:
            yield {"number": np.full((4,), step), "key": np.array(["a"] * 4)}
            step += 1


def run(steps=10, start=0, bad=None, window=None, **every):
    """Returns (steps seen by the step, logged lines, saves, previews, the exception or None)."""
    seen, logged, saved, looked = [], [], [], []

    def step(state, batch, key):
        assert set(batch) == {"number"}
        number = int(batch["number"][0])
        seen.append(number)
        loss = float("nan") if bad == number + 1 else float(number + 1)
        return state + 1, {"loss": np.float32(loss), "grad_norm": np.float32(1.0), "lr": np.float32(0.5)}

    watch = Watch(
        every.get("log", 3), every.get("save", 4), every.get("look", 0),
        lambda n, values: logged.append((n, values["loss"])),
        lambda n, state, w: saved.append((n, state, dict(w.sums), w.count)),
        lambda n, state: looked.append(n),
    )  # fmt: skip
    fault = None
    try:
        train(
            start, step, Batches(), name="s", start=start, steps=steps, key=jax.random.key(0), watch=watch, window=window or Window(),
            sharding=batch_sharding(make_mesh(MeshConfig())),
        )  # fmt: skip
    except Diverged as diverged:
        fault = diverged
    return seen, logged, saved, looked, fault


def test_lines_are_means_since_the_last_line():
    seen, logged, saved, looked, _ = run()
    assert seen == list(range(10))
    assert logged == [(3, 2.0), (6, 5.0), (9, 8.0), (10, 10.0)]
    assert [n for n, *_ in saved] == [4, 8, 10] and looked == [10]
    assert [state for _, state, *_ in saved] == [4, 8, 10]


def test_a_resumed_run_logs_the_lines_of_one_that_never_stopped():
    _, logged, saved, _, _ = run()
    number, _, sums, count = saved[0]
    assert run(start=number, window=Window(sums, count))[1] == [line for line in logged if line[0] > number]


def test_nan_stops_at_once_and_names_the_step():
    seen, logged, saved, looked, fault = run(bad=7)
    assert "stage s, step 7" in str(fault) and "loss is nan" in str(fault)
    assert seen[-1] <= 7  # at most the step after it was begun
    assert [n for n, *_ in saved] == [4]


@pytest.mark.parametrize("bad", [4, 8, 10])
def test_nan_at_a_step_that_would_be_saved_is_not_saved(bad):
    *_, saved, looked, fault = run(bad=bad)
    assert f"step {bad}" in str(fault) and all(n < bad for n, *_ in saved) and looked == []


def test_a_finished_stage_does_nothing():
    assert run(start=10)[:4] == ([], [], [], [])

"""The loop around a step, with steps that cost nothing."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pixart_jax.config import Config, GuardConfig, MeshConfig, StageConfig
from pixart_jax.errors import Interrupted
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.training import loop
from pixart_jax.training.interruption import PreemptionHandler
from pixart_jax.training.loop import TrainingDiverged
from pixart_jax.training.metrics import MetricWindow, StepTimer


class Batches:
    """Batch k holds the number k."""

    def iterator(self, start):
        step = start
        while True:
            yield {"number": np.full((4,), step), "key": np.array(["a"] * 4)}
            step += 1


class Step:
    """Counts, and says that the steps named in ``bad`` (from 1) were not taken. What it carries is
    the number of those that were."""

    def __init__(self, bad=()):
        self.bad, self.seen, self.row, self.executables = set(bad), [], 0, 0

    def __call__(self, state, batch, key):
        assert set(batch) == {"number"}
        self.executables = 1
        number = int(batch["number"][0])
        self.seen.append(number)
        skipped = number + 1 in self.bad
        self.row = self.row + 1 if skipped else 0
        loss = float("nan") if skipped else float(number + 1)
        metrics = {"loss": loss, "grad_norm": 1.0, "lr": 0.5}
        metrics |= {"skipped": skipped, "skipped_in_row": self.row}
        return state + (not skipped), {name: np.float32(value) for name, value in metrics.items()}


class Hooks:
    """Records what the loop calls."""

    def __init__(self, save_every):
        self.timer = StepTimer(4)
        self.save_every, self.logged, self.saved, self.previews = save_every, [], [], []

    def should_save(self, step):
        return step % self.save_every == 0

    def should_evaluate(self, step):
        return False

    def log(self, step, values):
        self.logged.append((step, values.get("loss"), values["skipped"]))

    def save(self, step, state, window, ended):
        self.saved.append((step, state, dict(window.sums), window.count, window.skipped))

    def preview(self, step, state):
        self.previews.append(step)

    def on_bad_step(self, step, values):
        return [f"record of {step}"]

    def flops(self, batch):
        return 0.0


def run(steps=10, start=0, bad=(), window=None, patience=3, stop=None, save=4):
    """Returns (steps seen by the step, logged lines, saves, previews, the exception or None)."""
    hooks, step, interruption = Hooks(save), Step(bad), PreemptionHandler()
    if stop:
        interruption.should_stop = lambda total: "SIGTERM" if total == stop + 100 else None
    config = Config(
        "loop",
        (StageConfig("before", steps=100), StageConfig("s", steps=steps)),
        log_every=3,
        guard=GuardConfig(bad_steps_in_row=patience),
    )
    run = SimpleNamespace(config=config, mesh=make_mesh(MeshConfig()), interruption=interruption)
    error = None
    try:
        loop.train(run, 1, start, step, Batches(), hooks, start, window or MetricWindow())
    except (TrainingDiverged, Interrupted) as raised:
        error = raised
    return step.seen, hooks.logged, hooks.saved, hooks.previews, error


def test_lines_are_means_since_the_last_line():
    seen, logged, saved, looked, _ = run()
    assert seen == list(range(10))
    assert logged == [(3, 2.0, 0), (6, 5.0, 0), (9, 8.0, 0), (10, 10.0, 0)]
    assert [n for n, *_ in saved] == [4, 8, 10] and looked == [10]
    assert [state for _, state, *_ in saved] == [4, 8, 10]


@pytest.mark.parametrize("bad", [(), (5,), (3, 4, 6)])
def test_a_resumed_run_logs_the_lines_of_one_that_never_stopped(bad):
    _, logged, saved, _, _ = run(bad=bad, patience=4)
    number, _, *window = saved[0]
    assert run(start=number, window=MetricWindow(*window), bad=bad, patience=4)[1] == [
        line for line in logged if line[0] > number
    ]


def test_a_skipped_step_is_counted_and_its_loss_is_in_no_mean():
    _, logged, saved, _, fault = run(bad=(2, 7, 8, 9))
    assert logged[:2] == [(3, 2.0, 1), (6, 5.0, 0)]
    assert "step 9, the last of 3 bad steps in a row" in str(fault)
    _, logged, *_ = run(bad=(7, 8, 9), patience=4)
    assert logged[2:] == [(9, None, 3), (10, 10.0, 0)]  # a line without a good step has no loss


def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_step_and_records():
    seen, logged, saved, looked, fault = run(bad=range(6, 11))
    assert isinstance(fault, TrainingDiverged)
    assert (
        str(fault)
        == "stage s, step 8, the last of 3 bad steps in a row: loss is nan; the batch held record "
        "of 8"
    )
    assert seen[-1] <= 8  # at most the step after it was begun
    assert [n for n, *_ in saved] == [4] and looked == []


@pytest.mark.parametrize("bad", [4, 7, 8, 10])
def test_with_a_patience_of_one_the_first_nan_stops_the_run_and_is_not_saved(bad):
    seen, _, saved, looked, fault = run(bad=(bad,), patience=1)
    assert f"step {bad}" in str(fault) and "loss is nan" in str(fault) and seen[-1] <= bad
    assert [n for n, *_ in saved] == [n for n in (4, 8) if n < bad] and looked == []


def test_a_save_that_falls_due_among_bad_steps_waits_for_a_good_one():
    """Else a long row of them would push the last saves before it out of those that are kept."""
    *_, saved, _, _ = run(bad=(4, 5))
    assert [n for n, *_ in saved] == [6, 8, 10]


def test_a_signal_saves_the_step_and_leaves_the_rest():
    seen, _, saved, looked, fault = run(stop=5)
    assert isinstance(fault, Interrupted) and seen == [0, 1, 2, 3, 4]
    assert [n for n, *_ in saved] == [4, 5] and looked == []


def test_a_signal_at_a_step_that_is_saved_anyway_saves_it_once():
    assert [n for n, *_ in run(stop=4)[2]] == [4]
    assert [n for n, *_ in run(stop=10)[2]] == [4, 8, 10]


class Told(np.ndarray):
    """A metric that tells when the host reads it."""

    read = None

    def __float__(self):
        self.read()
        return super().__float__()


def test_the_next_batch_is_on_its_way_and_its_step_begun_before_a_step_is_waited_for(monkeypatch):
    """Two steps are always begun, so the device finds its next batch where it computes and never
    waits for the host."""
    events = []
    real, call = loop.put, Step.__call__

    def put(rows, sharding):
        events.append(f"put {rows['number'][0] + 1}")
        return real(rows, sharding)

    monkeypatch.setattr(loop, "put", put)

    def begin(self, state, batch, key):
        number = int(batch["number"][0]) + 1
        events.append(f"begin {number}")
        state, metrics = call(self, state, batch, key)
        metrics["loss"] = np.asarray(metrics["loss"]).view(Told)
        metrics["loss"].read = lambda: events.append(f"wait {number}")
        return state, metrics

    monkeypatch.setattr(Step, "__call__", begin)
    monkeypatch.setattr(jax, "device_get", lambda tree: tree)
    run(steps=4, save=100)
    assert ", ".join(events) == (
        "put 1, begin 1, put 2, begin 2, wait 1, put 3, begin 3, wait 2, put 4, begin 4, "
        "wait 3, wait 4"
    )


def test_a_finished_stage_does_nothing():
    assert run(start=10)[:4] == ([], [], [], [])

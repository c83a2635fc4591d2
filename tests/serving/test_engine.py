"""The engine over a renderer that only waits: batches, the limit of the queue, cancelling,
previews, deadlines, draining, failures."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np
import pytest

from pixart_jax.errors import UserError
from pixart_jax.pipeline.folder import ModelFolder
from pixart_jax.serving import engine as engines
from pixart_jax.serving.engine import Done, Engine, Failed, Limits, Preview, Progress
from pixart_jax.serving.offer import Offer, Refused
from tests.serving.servers import SHIPPED, StubRenderer


@pytest.fixture(scope="module")
def offer():
    return Offer.of(ModelFolder.open(SHIPPED), max_count=8, adapters=["heart"])


@pytest.fixture
def start():
    """Starts engines over stubs, and ends them."""
    made = []

    def start(renderer=None, **options):
        renderer = renderer or StubRenderer()
        engine = Engine(lambda: renderer, limits=Limits(batch_size=4, **options))
        engine.start()
        made.append((engine, renderer))
        until(lambda: engine.state != "loading" and engine.state != "compiling")
        return engine, renderer

    yield start
    for engine, renderer in made:
        renderer.gate.set()
        assert engine.close(timeout=10)


def until(condition, seconds=10):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.002)


def submitted(engine, generation, **options):
    """(job, its events as a queue)."""
    events: queue.Queue = queue.Queue()
    return engine.submit(generation, events.put, **options), events


def all_done(events, count):
    return [events.get(timeout=10) for _ in range(count)]


def test_one_batch_holds_what_may_share_a_program_in_the_order_of_arrival(start, offer):
    engine, renderer = start()
    renderer.gate.clear()
    first = submitted(engine, offer.generation("blocks", seed=0))
    until(lambda: engine.running)
    plain = [submitted(engine, offer.generation(f"p{n}", seed=n, n=2)) for n in range(2)]
    other = submitted(engine, offer.generation("other size", size="96x96"))
    late = [submitted(engine, offer.generation(f"q{n}", guidance_scale=3.0)) for n in range(3)]
    unguided = submitted(engine, offer.generation("unguided", guidance_scale=1))
    merged = submitted(engine, offer.generation("merged", lora=[("heart", 0.5)]))
    assert engine.waiting == 10
    renderer.gate.set()
    for (_, events), count in [
        (first, 1),
        *((one, 2) for one in plain),
        (other, 1),
        *((one, 1) for one in late),
        (unguided, 1),
        (merged, 1),
    ]:
        assert all(isinstance(event, Done) for event in all_done(events, count))
    batches = [[generation.prompt for generation, _ in batch] for batch in renderer.batches]
    assert batches == [
        ["blocks"],
        ["p0", "p0", "p1", "p1"],
        ["other size"],
        ["q0", "q1", "q2"],
        ["unguided"],
        ["merged"],
    ]
    assert [k for _, k in renderer.batches[1]] == [0, 1, 0, 1]
    assert engine.programs == 3  # other weights of adapters share theirs


def test_the_queue_is_bounded_in_images_and_says_when_to_come_back(start, offer):
    engine, renderer = start(max_queue=5)
    renderer.gate.clear()
    submitted(engine, offer.generation("blocks"))
    until(lambda: engine.running)
    submitted(engine, offer.generation("a", n=4))
    with pytest.raises(engines.Unavailable, match="full") as error:
        engine.submit(offer.generation("b", n=2), print)
    assert 1 <= error.value.retry_after <= 120
    submitted(engine, offer.generation("b", n=1))


def test_cancelled_requests_leave_the_queue_and_end_a_batch_that_is_theirs_alone(start, offer):
    engine, renderer = start()
    renderer.gate.clear()
    job, events = submitted(engine, offer.generation("blocks", n=2))
    until(lambda: engine.running)
    waiting, its = submitted(engine, offer.generation("waits"))
    engine.cancel(waiting)
    assert engine.waiting == 0
    engine.cancel(job)
    renderer.gate.set()
    until(lambda: not engine.running)
    after, events_after = submitted(engine, offer.generation("after"))
    assert isinstance(events_after.get(timeout=10), Done)
    assert events.empty() and its.empty()
    assert [[d.prompt for d, _ in batch] for batch in renderer.batches] == [
        ["blocks"] * 2,
        ["after"],
    ]


def test_fast_steps_are_watched_once_a_second_unless_somebody_looks_on(start, offer):
    engine, renderer = start()
    for progress in (False, False, True):
        seconds = (
            0.001 if renderer.every else 0.4 / engine.limits.batch_size * 8
        )  # a step takes 0.4 s
        engine._seconds_an_image = seconds
        _, events = submitted(
            engine, offer.generation("a", num_inference_steps=8), progress=progress
        )
        while not isinstance(events.get(timeout=10), Done):
            pass
    assert renderer.every == [2, 8, 1]


def test_a_request_that_waited_too_long_is_dropped_before_it_is_generated(start, offer):
    engine, renderer = start(timeout=0.2)
    renderer.gate.clear()
    submitted(engine, offer.generation("blocks"))
    until(lambda: engine.running)
    _, events = submitted(engine, offer.generation("late"))
    time.sleep(0.25)
    renderer.gate.set()
    assert events.get(timeout=10).error.reason == "timeout"
    assert len(renderer.batches) == 1


def test_progress_and_previews(start, offer):
    engine, renderer = start()
    generation = offer.generation("a", num_inference_steps=8)
    _, events = submitted(engine, generation, previews=3, progress=True)
    found = []
    while not found or not isinstance(found[-1], Done):
        found.append(events.get(timeout=10))
    states = [(e.state, e.step) for e in found if isinstance(e, Progress)]
    assert states == [("queued", 0), ("compiling", 0), *(("running", n + 1) for n in range(8))]
    assert [e.number for e in found if isinstance(e, Preview)] == [0, 1, 2]
    _, events = submitted(engine, generation, progress=True)
    found = [events.get(timeout=10) for _ in range(2)]
    assert [e.state for e in found] == ["queued", "running"]  # compiled before


def test_no_more_programs_than_allowed(start, offer):
    engine, _ = start(max_programs=2)
    for steps in (4, 8):
        submitted(engine, offer.generation("a", num_inference_steps=steps))
    with pytest.raises(Refused, match="program 3 of at most 2"):
        engine.submit(offer.generation("a", num_inference_steps=14), print)
    submitted(engine, offer.generation("a", num_inference_steps=4))


def test_a_failed_batch_fails_its_requests_alone(start, offer, caplog):
    engine, _ = start()
    _, events = submitted(engine, offer.generation("explode"))
    _, others = submitted(engine, offer.generation("a"))
    error = events.get(timeout=10).error
    assert isinstance(error, engines.BatchFailed) and "secret" not in str(error)
    _, later = submitted(engine, offer.generation("b"))
    assert isinstance(later.get(timeout=10), Done)
    assert "secret detail" in caplog.text
    _, infinite = submitted(engine, offer.generation("infinite"))
    assert isinstance(infinite.get(timeout=10).error, UserError)


def test_states_and_draining(offer):
    opening, renderer = threading.Event(), StubRenderer()

    def open_renderer():
        opening.wait(10)
        return renderer

    renderer.gate.clear()
    engine = Engine(open_renderer, [offer.generation("warm up")], Limits(4))
    engine.start()
    with pytest.raises(engines.Unavailable) as error:
        engine.submit(offer.generation("a"), print)
    assert error.value.reason == engine.state == "loading"
    opening.set()
    until(lambda: engine.state == "compiling")
    _, early = submitted(engine, offer.generation("early"))  # waits for the warm-up
    renderer.gate.set()
    assert isinstance(early.get(timeout=10), Done)
    assert engine.state == "ready" and engine.alive
    renderer.gate.clear()
    waiting = [submitted(engine, offer.generation(f"{n}", n=3))[1] for n in range(4)]
    engine.drain()
    with pytest.raises(engines.Unavailable, match="draining"):
        engine.submit(offer.generation("a"), print)
    renderer.gate.set()
    assert engine.close(timeout=10)
    assert all(len(all_done(events, 3)) == 3 for events in waiting)
    assert not engine.alive


def test_a_model_that_cannot_be_opened_is_reported(offer):
    failures = []

    def broken():
        raise UserError("no such weights")

    engine = Engine(broken, on_failure=failures.append)
    engine.start()
    until(lambda: failures)
    assert engine.state == "failed" and str(failures[0]) == "no such weights"
    engine.close(timeout=5)


def test_a_stuck_batch_shows(start, offer):
    engine, renderer = start(stuck_after=0.05)
    renderer.gate.clear()
    submitted(engine, offer.generation("blocks"))
    until(lambda: not engine.alive)
    renderer.gate.set()
    until(lambda: engine.alive)


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"size": "65x65"}, "size"),
        ({"size": "64X64"}, "size"),
        ({"n": 0}, "n"),
        ({"n": 99}, "n"),
        ({"num_inference_steps": 21}, "num_inference_steps"),
        ({"solver": "dpm"}, "solver"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "1e3"}, "seed"),
        ({"lora": [("other", 1.0)]}, "lora"),
        ({"lora": [("heart", float("inf"))]}, "lora"),
        ({"mask": np.ones((8, 8), bool)}, "mask"),
        ({"control": np.zeros((64, 64, 3), np.uint8)}, "control"),
        ({"image": np.zeros((64, 64, 3), np.uint8), "strength": 0.123}, "strength"),
        (
            {"image": np.zeros((64, 64, 3), np.uint8), "strength": 0.05, "num_inference_steps": 4},
            "strength",
        ),
        ({"negative_prompt": "x" * 4001}, "negative_prompt"),
    ],
)
def test_what_is_not_offered_is_refused_by_its_field(offer, fields, param):
    with pytest.raises(Refused) as error:
        offer.generation("a", **fields)
    assert error.value.param == param and "\n" not in str(error.value)


def test_an_image_is_edited_at_the_offered_size_of_its_shape(offer):
    wide = np.zeros((50, 80, 3), np.uint8)
    assert (offer.generation("a", image=wide).height, offer.generation("a", image=wide).width) == (
        64,
        96,
    )
    plain = offer.generation("a")
    assert (plain.height, plain.width, plain.steps, plain.guidance) == (64, 64, 20, 2.0)
    full = offer.generation("a", image=wide, strength=1.0, size="64x64")
    assert full.program != plain.program and full.run_steps == plain.run_steps
    assert offer.generation("a", lora=[("heart", 1), ("heart", 0.5)]).lora == (("heart", 1.5),)
    assert offer.generation("a\x00b\x1bc").prompt == "a b c"


def test_failed_is_the_last_event_of_a_request(start, offer):
    engine, renderer = start()
    renderer.gate.clear()
    _, events = submitted(engine, offer.generation("infinite", n=6))
    renderer.gate.set()
    assert isinstance(events.get(timeout=10), Failed)
    until(lambda: not engine.running and not engine.waiting)
    assert events.empty()

import threading

import numpy as np
import pytest

from pixart_jax.data.plan import BatchSchedule
from pixart_jax.errors import UserError


def nine_buckets(n=100_000):
    share = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.06, 0.05, 0.03, 0.01])
    return np.random.default_rng(0).choice(9, n, p=share)


@pytest.mark.parametrize("batch_size", [32, 256, 1024])
def test_an_epoch_of_100000_in_nine_buckets_uses_over_99_percent_and_nothing_twice(batch_size):
    bucket_of = nine_buckets()
    plan = BatchSchedule(bucket_of, batch_size, seed=5)
    served, sizes = np.zeros((4, len(bucket_of)), int), np.bincount(bucket_of)
    by_window = []
    for epoch in range(3):
        window = np.zeros(len(bucket_of), int)
        for step in range(plan.first_step(epoch), plan.first_step(epoch + 1)):
            batch = plan.batch(step)
            assert len(batch.indices) == batch_size
            assert (bucket_of[batch.indices] == batch.bucket).all()
            if sizes[batch.bucket] >= 2 * batch_size:  # nor twice in a batch that two epochs share
                assert len(np.unique(batch.indices)) == batch_size
            np.add.at(served, (batch.epochs, batch.indices), 1)
            np.add.at(window, batch.indices, 1)
        by_window.append(window)
    assert served.max() == 1  # each epoch's samples are served once
    # What an epoch leaves over, less than a batch a bucket, is the beginning of the next one: late,
    # never lost.
    assert (served[:2] == 0).sum() == 0
    assert (served[2] == 0).sum() <= 9 * (batch_size - 1)
    if batch_size == 32:
        # unused within the epoch's own steps
        assert all((window == 0).mean() < 0.01 for window in by_window)


def test_samples_are_served_equally_often_at_any_moment():
    bucket_of = nine_buckets(3000)
    plan = BatchSchedule(bucket_of, 64, seed=1)
    count = np.zeros(3000, int)
    for step in range(400):
        np.add.at(count, plan.batch(step).indices, 1)
        if step % 50 == 49:
            for bucket in range(9):
                served = count[bucket_of == bucket]
                assert served.max() - served.min() <= (1 if len(served) >= 128 else 2)


def test_a_bucket_smaller_than_the_batch_is_served_in_proportion():
    plan = BatchSchedule(np.array([0] * 100 + [1] * 3), 16, seed=0)
    steps = [plan.batch(step) for step in range(plan.first_step(32))]
    assert sum(batch.bucket == 1 for batch in steps) == 3 * 32 // 16
    assert all((batch.indices >= 100).all() == (batch.bucket == 1) for batch in steps)


def test_a_step_s_batch_is_a_function_of_seed_and_step():
    bucket_of = nine_buckets(5000)
    plan = BatchSchedule(bucket_of, 32, seed=7)
    forward = [plan.batch(step) for step in range(300)]
    again = BatchSchedule(bucket_of, 32, seed=7)
    for step in np.random.default_rng(0).permutation(300):
        for field in ("bucket", "indices", "draws"):
            np.testing.assert_array_equal(
                getattr(again.batch(int(step)), field), getattr(forward[step], field)
            )
    other = BatchSchedule(bucket_of, 32, seed=8)
    assert any((other.batch(step).indices != forward[step].indices).any() for step in range(3))
    assert (forward[0].draws != forward[1].draws).all()


def test_threads_agree():
    bucket_of = nine_buckets(5000)
    alone, shared, found = (
        BatchSchedule(bucket_of, 32, seed=7),
        BatchSchedule(bucket_of, 32, seed=7),
        {},
    )

    def work(first):
        for step in range(first, 400, 4):
            found[step] = shared.batch(step).indices

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all((found[step] == alone.batch(step).indices).all() for step in range(400))


def test_epochs_differ_and_buckets_mix():
    plan = BatchSchedule(nine_buckets(20_000), 32, seed=3)
    epochs = [
        [plan.batch(step) for step in range(plan.first_step(e), plan.first_step(e + 1))]
        for e in (0, 1)
    ]
    assert (epochs[0][0].indices != epochs[1][0].indices).any()
    order = np.array([batch.bucket for batch in epochs[0]])
    assert (order[1:] != order[:-1]).mean() > 0.5


def test_a_set_smaller_than_the_batch_still_trains():
    plan = BatchSchedule(np.zeros(5, int), 12, seed=0)
    count = np.zeros(5, int)
    for step in range(10):
        np.add.at(count, plan.batch(step).indices, 1)
    assert (count == 24).all()


def test_left_out_samples_never_come():
    plan = BatchSchedule(np.array([0, -1, 0, 1, -1, 1] * 20), 8, seed=0)
    assert plan.samples == 80
    assert not any((plan.batch(step).indices % 6 % 3 == 1).any() for step in range(100))


@pytest.mark.parametrize(("buckets", "batch"), [([], 4), ([-1, -1], 4), ([0], 0)])
def test_nothing_to_train_on_is_refused(buckets, batch):
    with pytest.raises(UserError):
        BatchSchedule(np.array(buckets, int), batch, seed=0)


def test_a_negative_step_is_refused():
    with pytest.raises(UserError, match="step -1"):
        BatchSchedule(np.zeros(4, int), 2, 0).batch(-1)

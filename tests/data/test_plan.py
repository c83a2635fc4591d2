import resource
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pixart_jax.data.plan import BatchSchedule
from pixart_jax.errors import UserError


def nine_buckets(n=100_000):
    share = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.06, 0.05, 0.03, 0.01])
    return np.random.default_rng(0).choice(9, n, p=share)


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


def test_a_step_s_batch_is_a_function_of_seed_and_step_in_any_order_and_thread():
    bucket_of, order = nine_buckets(5000), np.random.default_rng(0).permutation(300).tolist()
    plan = BatchSchedule(bucket_of, 32, seed=7)
    forward = [plan.batch(step) for step in range(300)]
    with ThreadPoolExecutor(4) as pool:
        again = pool.map(BatchSchedule(bucket_of, 32, seed=7).batch, order)
        for step, batch in zip(order, again):
            for field in ("bucket", "indices", "epochs", "draws"):
                expected = getattr(forward[step], field)
                np.testing.assert_array_equal(getattr(batch, field), expected)
    other = BatchSchedule(bucket_of, 32, seed=8)
    assert any((other.batch(step).indices != forward[step].indices).any() for step in range(3))
    assert (forward[0].draws != forward[1].draws).all()


def test_epochs_differ_and_buckets_mix():
    plan = BatchSchedule(nine_buckets(20_000), 32, seed=3)
    steps = [range(plan.first_step(e), plan.first_step(e + 1)) for e in (0, 1)]
    epochs = [[plan.batch(step) for step in some] for some in steps]
    assert (epochs[0][0].indices != epochs[1][0].indices).any()
    order = np.array([batch.bucket for batch in epochs[0]])
    assert (order[1:] != order[:-1]).mean() > 0.5


@pytest.mark.parametrize("buckets", [[], [-1, -1]])
def test_nothing_to_train_on_is_refused(buckets):
    with pytest.raises(UserError, match="no sample to train on"):
        BatchSchedule(np.array(buckets, int), 4, seed=0)


# ---- whatever the set ----


def skewed(n=100_000, buckets=40, seed=0):
    """int16 [n]: buckets as unequal as the aspect ratios of photographs, the smallest with a few
    dozen samples."""
    share = 1 / np.arange(1, buckets + 1) ** 1.6
    return np.random.default_rng(seed).choice(buckets, n, p=share / share.sum()).astype(np.int16)


def drawn(seed):
    """(bucket of each sample, batch size) of a small set."""
    rng = np.random.default_rng(seed)
    buckets = int(rng.integers(1, 12))
    count, shares = int(rng.integers(20, 2000)), rng.dirichlet(np.full(buckets, 0.5))
    bucket_of = rng.choice(buckets, count, p=shares)
    bucket_of[rng.random(len(bucket_of)) < 0.05] = -1
    return bucket_of, int(rng.choice([1, 3, 8, 24, 64]))


@pytest.mark.parametrize("batch_size", [32, 384])
def test_100000_samples_in_40_buckets_none_is_served_twice_in_an_epoch_and_none_is_lost(batch_size):
    bucket_of = skewed()
    sizes, epochs = np.bincount(bucket_of), 3
    plan = BatchSchedule(bucket_of, batch_size, seed=11)
    served = np.zeros((epochs + 40, len(bucket_of)), np.int8)
    for epoch in range(epochs):
        first_seen = served.sum() == 0
        for step in range(plan.first_step(epoch), plan.first_step(epoch + 1)):
            batch = plan.batch(step)
            assert (bucket_of[batch.indices] == batch.bucket).all()
            if sizes[batch.bucket] >= 2 * batch_size:  # not even in a batch that two epochs share
                assert len(np.unique(batch.indices)) == batch_size
            np.add.at(served, (batch.epochs, batch.indices), 1)
        assert served.max() == 1  # each pass serves a sample once at most
        late = sum((epoch + 1) * int(n) % batch_size for n in sizes)
        assert served[: epoch + 1].sum() == (epoch + 1) * len(bucket_of) - late
        if first_seen and batch_size == 32:
            # under 1 % unused in an epoch of 100,000 even if the run stopped there
            assert late < 0.01 * len(bucket_of)
    lost = served[: epochs - 1][:, sizes[bucket_of] >= batch_size] == 0
    assert not lost.any()  # what an epoch left over has all come in the next


@pytest.mark.parametrize("seed", range(25))
def test_each_pass_serves_each_sample_once_and_every_batch_is_full_and_of_one_bucket(seed):
    bucket_of, batch_size = drawn(seed)
    plan, usable = BatchSchedule(bucket_of, batch_size, seed), bucket_of >= 0
    served: dict[tuple[int, int], int] = {}
    steps = plan.first_step(4)
    for step in range(steps):
        batch = plan.batch(step)
        assert len(batch.indices) == len(batch.epochs) == len(batch.draws) == batch_size
        assert (bucket_of[batch.indices] == batch.bucket).all()
        for place in zip(batch.epochs.tolist(), batch.indices.tolist()):
            served[place] = served.get(place, 0) + 1
    assert set(served.values()) <= {1}
    for bucket in np.unique(bucket_of[usable]):
        members = np.flatnonzero(bucket_of == bucket)
        total = 4 * len(members) // batch_size * batch_size  # the stream of a bucket has no gap
        assert sum(1 for _, index in served if bucket_of[index] == bucket) == total
        whole = total // len(members)
        assert all((epoch, int(index)) in served for epoch in range(whole) for index in members)


def test_ten_million_samples_are_planned_in_seconds_and_a_far_step_at_once():
    bucket_of = skewed(10_000_000)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = BatchSchedule(bucket_of, 384, seed=0)
    batches = [plan.batch(step) for step in (0, 1, 26_041, 10**9)]
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # KiB
    assert all(batch.indices.max() < 10_000_000 for batch in batches)
    assert all(batch.indices.dtype == np.int64 for batch in batches)

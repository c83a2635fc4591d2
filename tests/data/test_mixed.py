"""Mixtures in training: shares as weighted, no sample preferred, a batch a function of seed and
step."""

import numpy as np
import pytest

from pixart_jax.data.loader import Loader
from pixart_jax.data.mixed import MixedSamples
from pixart_jax.errors import UserError


class Numbers:
    """Samples that are their own numbers; a third of them in the first bucket."""

    def __init__(self, name, count, buckets=((32, 32), (32, 64)), left_out=(), length=4, made=None):
        self.name, self.buckets, self.length, self.identity = name, buckets, length, made
        self.fingerprint = name
        self.bucket_of = (np.arange(count) % 3 == 0).astype(np.int16) % len(buckets)
        self.bucket_of[list(left_out)] = -1

    def read(self, indices, bucket, draws):
        assert (self.bucket_of[indices] == bucket).all() and ((0 <= draws) & (draws < 1)).all()
        return {
            "key": np.array([f"{self.name}{i}" for i in indices]),
            "text_states": np.zeros((len(indices), self.length, 2)),
            "draw": np.asarray(draws),
        }


def mixed(counts=(60, 200), shares=(0.6, 0.4), **options):
    parts = [Numbers(name, count, **options) for name, count in zip("abc", counts)]
    return MixedSamples(parts, shares, "abc"[: len(parts)])


def epochs(samples, batch_size, count, seed=0):
    """The keys of some epochs, epoch by epoch."""
    loader = Loader(samples, batch_size=batch_size, seed=seed)
    steps = [loader.plan.first_step(epoch) for epoch in range(count + 1)]
    return [
        np.concatenate([loader.batch(step)["key"] for step in range(*some)])
        for some in zip(steps, steps[1:])
    ]


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [((300, 900), (0.7, 0.3)), ((50, 2000), (0.5, 0.5)), ((400, 400, 400), (0.2, 0.3, 0.5))],
)
def test_an_epoch_shows_each_set_by_its_share(sizes, shares):
    samples, whole = mixed(sizes, shares), sum(sizes)
    assert abs(len(samples) - whole) <= 2 * len(sizes)  # rounded, a bucket at a time
    for keys in epochs(samples, 8, 2):
        for name, share in zip("abc", shares):
            assert abs(np.mean([key[0] == name for key in keys]) - share) < 16 / whole + 0.01


def test_a_sample_is_shown_its_whole_times_for_certain_and_none_is_preferred():
    # a: 300 places for 120 samples, so 2 or 3 times; b: 300 for 480, so 0 to 2
    samples, rounds = mixed((120, 480), (0.5, 0.5)), 60
    counts = {key: [] for key in [f"a{i}" for i in range(120)] + [f"b{i}" for i in range(480)]}
    for keys in epochs(samples, 10, rounds):
        found = dict(zip(*np.unique(keys, return_counts=True)))
        for key, times in counts.items():
            times.append(int(found.get(key, 0)))
    for name, rate, least, most in (("a", 2.5, 1, 5), ("b", 0.625, 0, 3)):
        shown = np.array([times for key, times in counts.items() if key[0] == name])
        means = shown.mean(1)
        assert abs(means.mean() - rate) < 0.02
        # 60 epochs of a coin: 0.065 a sample
        assert means.std() < 0.1 and abs(means - rate).max() < 0.35
        # a batch that straddles two epochs may move one of them
        assert least <= shown[:, 1:].min() and shown[:, 1:].max() <= most


def test_a_batch_is_a_function_of_seed_and_step_alone():
    one = Loader(mixed(), batch_size=8, seed=3)
    other = Loader(mixed(), batch_size=8, seed=3, rows=range(4, 8))
    for step in (40, 3, 17):
        np.testing.assert_array_equal(one.batch(step)["key"][4:], other.batch(step)["key"])
    assert (Loader(mixed(), batch_size=8, seed=4).batch(3)["key"] != one.batch(3)["key"]).any()


def test_rows_keep_their_order_and_have_one_length_of_text():
    parts = [Numbers("a", 60, length=4), Numbers("b", 200, ((32, 64), (48, 48)), length=16)]
    samples = MixedSamples(parts, (0.5, 0.5), "ab")
    assert samples.length == 16 and samples.buckets == ((32, 32), (32, 64), (48, 48))
    for bucket in range(3):
        places = np.flatnonzero(samples.bucket_of == bucket)[::7][:20]
        draws = np.random.default_rng(bucket).random(len(places))
        chosen = [samples.chosen(place, draw) for place, draw in zip(places, draws)]
        batch = samples.read(places, bucket, draws)
        assert batch["key"].tolist() == [f"{'ab'[part]}{number}" for part, number in chosen]
        assert batch["text_states"].shape == (len(places), 16, 2)


def test_the_draw_that_is_handed_on_is_uniform_whichever_sample_was_chosen():
    samples = mixed((30, 3000), (0.0004, 0.9996))
    places = np.resize(np.flatnonzero(samples.bucket_of == 0), 20_000)
    batch = samples.read(places, 0, draws := np.random.default_rng(0).random(20_000))
    numbers, handed = np.array([int(key[1:]) for key in batch["key"]]), batch["draw"]
    assert 0 <= handed.min() and handed.max() < 1 and abs(handed.mean() - 0.5) < 0.01
    for some in (numbers % 2 == 0, numbers % 7 == 3, draws < 0.1):
        assert abs(handed[some].mean() - 0.5) < 0.03


def test_what_a_part_leaves_out_is_not_drawn():
    parts = [Numbers("a", 30, left_out=range(10)), Numbers("b", 30)]
    keys = {key for keys in epochs(MixedSamples(parts, (0.5, 0.5), "ab"), 4, 5) for key in keys}
    assert not {f"a{i}" for i in range(10)} & keys
    with pytest.raises(UserError, match="a, a part of a mixture, has no sample"):
        MixedSamples([Numbers("a", 3, left_out=range(3)), parts[1]], (0.5, 0.5), "ab")


def test_sets_of_different_encoders_are_not_mixed():
    made = {"vae": "one", "source": "x", "samples": "1", "max_text_tokens": "120"}

    def mix(other):
        MixedSamples([Numbers("a", 9, made=made), Numbers("b", 9, made=other)], (0.5, 0.5), "ab")

    alike = made | {"source": "y", "samples": "2"}
    mix(alike)
    message = "a and b cannot be mixed: vae is one in the one and other in the other"
    with pytest.raises(UserError, match=message):
        mix(alike | {"vae": "other"})
    with pytest.raises(UserError, match="only one says which encoders"):
        mix(None)

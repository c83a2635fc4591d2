"""Mixtures in training: shares as weighted, no sample preferred, a batch a function of seed and
step."""

import numpy as np
import pytest

from pixart_jax.data.loader import Loader
from pixart_jax.data.mixed import MixedSamples
from pixart_jax.errors import UserError


class Numbers:
    """Samples that are their own numbers; each third bucket of its own, some left out."""

    def __init__(
        self,
        name: str,
        count: int,
        buckets=((32, 32), (32, 64)),
        left_out=(),
        length=4,
        identity=None,
    ):
        self.name, self.buckets, self.length = name, buckets, length
        self.bucket_of = (np.arange(count) % 3 == 0).astype(np.int16) % len(buckets)
        self.bucket_of[list(left_out)] = -1
        if identity is not None:
            self.identity = identity

    def read(self, indices, bucket, draws):
        assert (self.bucket_of[indices] == bucket).all() and ((0 <= draws) & (draws < 1)).all()
        return {
            "key": np.array([f"{self.name}{i}" for i in indices]),
            "text_states": np.zeros((len(indices), self.length, 2)),
            "draw": np.asarray(draws),
        }


def epochs(samples, batch_size, count, seed=0):
    """The keys of some epochs, epoch by epoch."""
    loader = Loader(samples, batch_size=batch_size, seed=seed)
    plan = loader.plan
    return [
        np.concatenate(
            [
                loader.batch(step)["key"]
                for step in range(plan.first_step(e), plan.first_step(e + 1))
            ]
        )
        for e in range(count)
    ]


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [((300, 900), (0.7, 0.3)), ((50, 2000), (0.5, 0.5)), ((400, 400, 400), (0.2, 0.3, 0.5))],
)
def test_an_epoch_shows_each_set_by_its_share(sizes, shares):
    parts = [Numbers(name, size) for name, size in zip("abc", sizes)]
    samples = MixedSamples(parts, shares, "abc"[: len(parts)])
    whole = sum(sizes)
    assert abs(len(samples) - whole) <= 2 * len(parts)  # rounded, a bucket at a time
    for keys in epochs(samples, 8, 2):
        for name, share in zip("abc", shares):
            assert abs(np.mean([key[0] == name for key in keys]) - share) < 16 / whole + 0.01


def test_a_sample_is_shown_the_whole_times_for_certain_and_none_is_preferred():
    parts = [Numbers("a", 120), Numbers("b", 480)]
    # a: 300 of 120, so 2 or 3 times; b: 300 of 480, so 0 or 1
    samples = MixedSamples(parts, (0.5, 0.5), "ab")
    counts = {key: [] for key in [f"a{i}" for i in range(120)] + [f"b{i}" for i in range(480)]}
    rounds = 60
    for keys in epochs(samples, 10, rounds):
        shown, times = np.unique(keys, return_counts=True)
        found = dict(zip(shown, times))
        for key in counts:
            counts[key].append(int(found.get(key, 0)))
    mean = {key: np.mean(times) for key, times in counts.items()}
    for name, rate in (("a", 2.5), ("b", 0.625)):
        means = np.array([value for key, value in mean.items() if key[0] == name])
        assert abs(means.mean() - rate) < 0.02
        # 60 epochs of a coin: 0.065 a sample
        assert means.std() < 0.1 and abs(means - rate).max() < 0.35
    # Two places for certain and one or two left over, or none and up to two; a batch that straddles
    # two epochs may move one of them.
    assert all(
        1 <= min(times[1:]) and max(times[1:]) <= 5
        for key, times in counts.items()
        if key[0] == "a"
    )
    assert all(max(times[1:]) <= 3 for key, times in counts.items() if key[0] == "b")


def test_a_batch_is_a_function_of_seed_and_step_alone():
    def made():
        return MixedSamples([Numbers("a", 60), Numbers("b", 200)], (0.6, 0.4), "ab")

    one, other = (
        Loader(made(), batch_size=8, seed=3),
        Loader(made(), batch_size=8, seed=3, rows=range(4, 8)),
    )
    for step in (40, 3, 17):
        np.testing.assert_array_equal(one.batch(step)["key"][4:], other.batch(step)["key"])
    assert (Loader(made(), batch_size=8, seed=4).batch(3)["key"] != one.batch(3)["key"]).any()


def test_rows_keep_their_order_their_draw_and_one_length_of_text():
    parts = [Numbers("a", 60, length=4), Numbers("b", 200, ((32, 64), (48, 48)), length=16)]
    samples = MixedSamples(parts, (0.5, 0.5), "ab")
    assert samples.length == 16 and samples.buckets == ((32, 32), (32, 64), (48, 48))
    for bucket in range(3):
        places = np.flatnonzero(samples.bucket_of == bucket)[::7][:20]
        draws = np.random.default_rng(bucket).random(len(places))
        which, numbers, rests = samples.chosen(places, draws)
        batch = samples.read(places, bucket, draws)
        assert batch["key"].tolist() == [
            f"{'ab'[part]}{number}" for part, number in zip(which, numbers)
        ]
        np.testing.assert_array_equal(batch["draw"], rests)
        assert batch["text_states"].shape == (len(places), 16, 2)


def test_the_draw_that_is_handed_on_is_uniform_in_every_digit_and_untouched_where_nothing_was_chosen():  # noqa: E501
    # a: one place, for all its samples
    samples = MixedSamples([Numbers("a", 30), Numbers("b", 3000)], (0.0004, 0.9996), "ab")
    lengths = samples._ends - samples._starts
    choosing, certain = np.flatnonzero(lengths > 2), np.flatnonzero(lengths == 1)
    assert len(choosing) and len(certain)
    draws = np.random.default_rng(0).random(20_000)
    which, numbers, handed = samples.chosen(np.resize(choosing, 20_000), draws)
    assert 0 <= handed.min() and handed.max() < 1 and abs(handed.mean() - 0.5) < 0.01
    for digit in (1, 2, 20, 44):  # the loader takes far digits too, to mirror pictures by
        assert abs(np.mean((handed * 2.0**digit).astype(np.int64) & 1) - 0.5) < 0.02
    for some in (numbers % 2 == 0, numbers % 7 == 3, draws < 0.1):  # whichever sample was chosen
        assert abs(handed[some].mean() - 0.5) < 0.03
    np.testing.assert_array_equal(samples.chosen(np.resize(certain, 20_000), draws)[2], draws)


def test_what_a_part_leaves_out_is_not_drawn():
    samples = MixedSamples(
        [Numbers("a", 30, left_out=range(10)), Numbers("b", 30)], (0.5, 0.5), "ab"
    )
    assert not {f"a{i}" for i in range(10)} & {
        key for keys in epochs(samples, 4, 5) for key in keys
    }
    with pytest.raises(UserError, match="a, a part of a mixture, has no sample"):
        MixedSamples([Numbers("a", 3, left_out=range(3)), Numbers("b", 3)], (0.5, 0.5), "ab")


def test_sets_of_different_encoders_are_not_mixed():
    made = {"vae": "one", "source": "x", "samples": "1", "max_text_tokens": "120"}
    alike = made | {"source": "y", "samples": "2"}
    MixedSamples(
        [Numbers("a", 9, identity=made), Numbers("b", 9, identity=alike)], (0.5, 0.5), "ab"
    )
    with pytest.raises(
        UserError, match="a and b cannot be mixed: vae is one in the one and other in the other"
    ):
        MixedSamples(
            [Numbers("a", 9, identity=made), Numbers("b", 9, identity=alike | {"vae": "other"})],
            (0.5, 0.5),
            "ab",
        )
    with pytest.raises(UserError, match="only one of them says"):
        MixedSamples([Numbers("a", 9, identity=made), Numbers("b", 9)], (0.5, 0.5), "ab")

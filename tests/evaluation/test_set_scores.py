"""Fréchet distance, KID, Inception score, precision and recall against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from pixart_jax.errors import UserError
from pixart_jax.evaluation import frechet, set_scores
from pixart_jax.evaluation.frechet import Statistics, compare, distance, statistics

rng = np.random.default_rng(7)


def gaussian(covariance, mean=0.0):
    covariance = np.asarray(covariance, float)
    return Statistics(np.zeros(len(covariance)) + mean, covariance, 1000)


def test_statistics_are_numpys_whatever_the_slices(monkeypatch):
    features = (rng.normal(size=(500, 20)) * 3 + 100).astype(np.float32)
    for rows in (7, 4096):
        monkeypatch.setattr(frechet, "_ROWS", rows)
        found = statistics(features)
        wide = features.astype(np.float64)
        assert np.abs(found.mean - wide.mean(0)).max() < 1e-11
        assert np.abs(found.covariance - np.cov(wide, rowvar=False)).max() < 1e-11
        assert found.count == 500 and found.rows is None
    with pytest.raises(UserError, match="at least 2"):
        statistics(features[:1])


def test_distance_has_its_closed_forms():
    spread = np.diag(rng.uniform(0.5, 2, 6))
    assert distance(gaussian(spread), gaussian(spread)) == pytest.approx(0, abs=1e-12)
    assert distance(gaussian(spread, 2.0), gaussian(spread)) == pytest.approx(4 * 6)
    a, b = rng.uniform(0.1, 4, (2, 6))
    expected = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance(gaussian(np.diag(a)), gaussian(np.diag(b))) == pytest.approx(expected)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]  # the same in other axes
    turned = [gaussian(turn @ np.diag(v) @ turn.T) for v in (a, b)]
    assert distance(*turned) == pytest.approx(expected)
    assert distance(gaussian([[4.0]], 3.0), gaussian([[1.0]])) == pytest.approx(9 + 1)


@pytest.mark.parametrize(("n", "m"), [(300, 200), (300, 20), (20, 300), (20, 30)])
def test_distance_equals_the_square_root_of_the_product(n, m):
    """Full and singular covariances, in 64 dimensions; the same from either side."""
    x, y = rng.normal(size=(n, 64)), rng.normal(size=(m, 64)) * 1.5 + 0.2
    a, b = statistics(x), statistics(y)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a.covariance @ b.covariance).real, 0)).sum()
    if min(n, m) > 64:
        assert root == pytest.approx(np.trace(scipy.linalg.sqrtm(a.covariance @ b.covariance)).real)
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance) - 2 * root
    found = [distance(a, b), distance(b, a), compare(x, a, b).value]
    plain = [Statistics(s.mean, s.covariance, s.count) for s in (a, b)]  # as read from files
    assert [*found, distance(*plain)] == pytest.approx([expected] * 4, rel=1e-5)


@pytest.mark.parametrize(("d", "n", "m"), [(16, 400, 5000), (64, 30, 500)])
def test_the_interval_holds_the_spread_of_repeated_samples(d, n, m):
    scale = np.sqrt(1 / np.arange(1, d + 1))
    b = statistics(rng.normal(size=(m, d)) * scale * 1.1 + 0.05)
    samples = [rng.normal(size=(n, d)) * scale for _ in range(120)]
    found = [compare(x, statistics(x), b) for x in samples]
    spread = np.std([f.value for f in found])
    predicted = np.mean([(f.interval[1] - f.value) / 1.96 for f in found])
    assert 0.8 < predicted / spread < 1.4


def test_bias_in_n_is_as_predicted_and_extrapolation_removes_it():
    scale = np.sqrt(1 / np.arange(1, 65))
    exact = gaussian(np.diag(scale**2))
    samples = [rng.normal(size=(1500, 64)) * scale for _ in range(4)]
    mean = np.mean([distance(statistics(x), exact) for x in samples])
    predicted = frechet.bias_times_n(scale**2) / 1500
    assert mean == pytest.approx(predicted, rel=0.05)
    equal = frechet.bias_times_n(np.full(10, 3.0))
    assert equal == pytest.approx(3.0 * 10 * 15 / 4)
    x = samples[0]
    assert compare(x, statistics(x), exact).bias == pytest.approx(predicted * 2.5, rel=0.1)
    intercept, points = frechet.extrapolate(x, exact)
    assert len(points) == 15 and (points[0][0], points[-1][0]) == (750, 1500)
    assert abs(intercept) < 0.15 * points[-1][1] and points[0][1] > 1.8 * points[-1][1]


def test_kid_of_point_masses_and_of_equal_sets():
    a, b = rng.normal(size=(2, 8))
    x, y = np.tile(a, (30, 1)), np.tile(b, (40, 1))
    kernel = lambda u, v: (u @ v / 8 + 1) ** 3  # noqa: E731
    expected = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
    assert set_scores.kid(x, y, subsets=3) == pytest.approx((expected, 0), abs=1e-9)
    same = rng.normal(size=(2, 400, 8))
    mean, deviation = set_scores.kid(*same, size=200)
    assert abs(mean) < 3 * deviation / 10 + 0.02
    assert set_scores.kid(same[0], same[1] + 1, size=200)[0] > 20 * abs(mean)


def test_inception_score_of_one_hot_and_uniform_classes():
    sure = 100.0 * np.tile(np.eye(5), (20, 1))
    assert set_scores.inception_score(sure, splits=1)[0] == pytest.approx(5)
    assert set_scores.inception_score(np.zeros((50, 5))) == pytest.approx((1, 0))


def test_precision_and_recall_see_a_missing_mode():
    near, far = rng.normal(size=(2, 60, 2)) * 0.1 + np.array([[[0, 0]], [[50, 50]]])
    both = np.concatenate([near, far])
    one = set_scores.precision_recall(near + 0.001, both)
    assert (one["precision"], one["recall"]) == (1.0, 0.5) and one["coverage"] == 0.5
    other = set_scores.precision_recall(both, near + 0.001)
    assert (other["precision"], other["recall"]) == (0.5, 1.0)
    assert set_scores.precision_recall(both, both)["density"] > 1
    assert set_scores.precision_recall(near + 9, far)["density"] == 0


def test_statistics_files_are_read_by_others_and_theirs_by_us(tmp_path):
    own = statistics(rng.normal(size=(40, 6)))
    facts = {"n": 40, "mode": "clean", "weights": "abc"}
    frechet.write(tmp_path / "own.npz", {"": own, "_s": own}, facts)
    with np.load(tmp_path / "own.npz") as file:  # as pytorch-fid does
        assert np.array_equal(file["mu"][:], own.mean)
        assert np.array_equal(file["sigma"][:], own.covariance)
    parts, read, _ = frechet.read(tmp_path / "own.npz")
    assert read == facts and parts["_s"].count == 40
    assert distance(parts[""], own) == pytest.approx(0, abs=1e-7)
    adm = {"mu": own.mean, "sigma": own.covariance}
    adm |= {f"{name}_s": value for name, value in adm.items()}
    np.savez(tmp_path / "adm.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8), **adm)
    parts, read, images = frechet.read(tmp_path / "adm.npz")
    assert read["mode"] == "tensorflow" and images and parts[""].count == 0


def test_cmmd_of_equal_sets_and_of_two_points():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(1500, 8)).astype("f4")
    assert set_scores.cmmd(a, a[::-1]) == pytest.approx(0, abs=1e-9)
    x, y = rng.normal(size=(2, 8))
    found = set_scores.cmmd(np.tile(x, (5, 1)), np.tile(y, (3, 1)))
    assert found == pytest.approx(2000 * (1 - np.exp(-((x - y) ** 2).sum() / 200)), rel=1e-6)

"""A cache of features for each test of its own."""

from __future__ import annotations

import pytest

from pixart_jax.evaluation import features


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "cache_folder", lambda keep: tmp_path / "cache")
    return tmp_path / "cache"

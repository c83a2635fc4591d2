"""A run's folder belongs to one config and one process."""

from __future__ import annotations

import dataclasses
import json

import jax
import pytest

from pixart_jax.config import (
    Config,
    DataConfig,
    GuardConfig,
    OptimizerConfig,
    ProfileConfig,
    StageConfig,
)
from pixart_jax.errors import UserError
from pixart_jax.training.workdir import Workdir, as_json, enable_compilation_cache

FAST = OptimizerConfig(learning_rate=1e-3)
CONFIG = Config("a", (StageConfig("one", steps=10), StageConfig("two", optimizer=FAST)))
SLOW = OptimizerConfig(learning_rate=1e-4)


WIDE = DataConfig(buckets=((64, 64), (64, 96)))


def other(**changes) -> Config:
    stage = dataclasses.replace(CONFIG.stages[1], **changes)
    return dataclasses.replace(CONFIG, stages=(CONFIG.stages[0], stage))


@pytest.fixture
def begun(tmp_path):
    """A folder that a run of CONFIG has begun."""
    with Workdir(tmp_path / "run", CONFIG) as folder:
        folder.save_config()
    return folder.path


def test_the_same_config_comes_back(begun):
    assert json.loads((begun / "config.json").read_text()) == as_json(CONFIG)
    with Workdir(begun, CONFIG):
        pass


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (other(steps=11), "stages.1.steps was 1000, now 11"),
        (other(optimizer=SLOW), "stages.1.optimizer.learning_rate was 0.001, now 0.0001"),
        (other(data=WIDE), "stages.1.data.buckets.1.0 was absent, now 64"),
        (dataclasses.replace(CONFIG, seed=1), "seed was 0, now 1"),
    ],
)
def test_another_config_is_refused_with_what_differs(begun, config, said):
    before = (begun / "config.json").read_text()
    with pytest.raises(UserError) as error, Workdir(begun, config):
        pass
    assert said in str(error.value) and "\n" not in str(error.value)
    assert (begun / "config.json").read_text() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"log_every": 1, "checkpoint_every": 5, "remat": "full"},
        {"stages": other(data=DataConfig(workers=7, strict=True)).stages},
        {"keep_every": 7, "keep_checkpoints": 1, "profile": ProfileConfig((1, 2))},
        {"guard": GuardConfig(bad_steps_in_row=3)},
    ],
)
def test_what_is_logged_kept_or_watched_may_change(begun, changes):
    with Workdir(begun, dataclasses.replace(CONFIG, **changes)):
        pass


def test_two_runs_cannot_write_one_folder(tmp_path):
    with Workdir(tmp_path, CONFIG), pytest.raises(UserError, match="in use by another run"):
        Workdir(tmp_path, CONFIG).__enter__()


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file"), Workdir(tmp_path / "run", CONFIG):
        pass


def test_a_run_of_an_older_version_goes_on_and_its_missing_fields_are_defaults(begun):
    file = begun / "config.json"
    old = json.loads(file.read_text())
    del old["guard"], old["keep_every"], old["profile"]
    del old["stages"][1]["optimizer"]["clip"], old["model"]["qk_norm"]
    file.write_text(json.dumps(old))
    with Workdir(begun, CONFIG) as folder:
        folder.save_config()
    assert json.loads(file.read_text()) == as_json(CONFIG)
    file.write_text(json.dumps(old))
    changed = dataclasses.replace(CONFIG, guard=GuardConfig(spike_factor=None))
    message = "guard.spike_factor was 20.0, now null"
    with pytest.raises(UserError, match=message), Workdir(begun, changed):
        pass


def test_another_place_for_compiled_programs_wins(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
        enable_compilation_cache(tmp_path / "ours")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache(tmp_path / "ours")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "ours")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)

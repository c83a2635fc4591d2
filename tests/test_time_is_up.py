"""A slow test that would begin after TESTS_UNTIL is skipped and says so; others run."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

SUITE = """
import pytest

@pytest.mark.slow
def test_slow():
    pass

def test_quick():
    pass
"""


@pytest.mark.parametrize(
    ("seconds", "outcome"), [(-1, "1 passed, 1 skipped"), (600, "2 passed"), (None, "2 passed")]
)
def test_slow_tests_are_begun_until_the_time_is_up(root, tmp_path, seconds, outcome):
    (tmp_path / "test_suite.py").write_text(SUITE)
    environment = {name: value for name, value in os.environ.items() if name != "TESTS_UNTIL"}
    if seconds is not None:
        environment["TESTS_UNTIL"] = str(int(time.time() + seconds))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        root / "pyproject.toml",
        "-p",
        "tests.conftest",
    ]
    done = subprocess.run(
        [*command, tmp_path / "test_suite.py"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and outcome in done.stdout, done.stdout + done.stderr
    assert ("make test-slow" in done.stdout) == ("skipped" in outcome)

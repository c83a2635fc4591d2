"""The parity table: its quick rows hold, its document is what its command writes, and a row over
its bound is told."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import parity
from benchmarks.parity_rows import ROWS
from benchmarks.parity_rows.document import render
from benchmarks.parity_rows.row import errors

pytestmark = pytest.mark.usefixtures("optimized")
QUICK = [row for row in ROWS if row.tier == "quick"]
BY_NAME = {row.name: row for row in ROWS}


# tests/models, tests/weights and test_pipeline.py compare the same models with the same references
SLOW = [row.name for row in QUICK if row.name != "dit tiny"]
QUICK_ROWS = [
    pytest.param(row, id=row.name, marks=[pytest.mark.slow] * (row.name in SLOW)) for row in QUICK
]


@pytest.mark.parametrize("row", QUICK_ROWS)
def test_quick_rows_hold(row, tmp_path):
    theirs = row.theirs(tmp_path)
    if "sharded" in row.format:
        (index,) = tmp_path.rglob("*.index.json")
        assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    error = row.compare(row.ours(tmp_path), theirs)
    print(row.name, error)
    assert row.holds(error), error


def test_the_document_is_what_the_command_writes_and_every_row_in_it_holds():
    results = json.loads(parity.DOCUMENT.with_suffix(".json").read_text())
    assert parity.DOCUMENT.read_text() == render(ROWS, results)
    assert list(results) == [row.name for row in ROWS if row.name in results]
    assert set(results) >= {row.name for row in QUICK}
    for name, result in results.items():
        assert BY_NAME[name].holds(result["error"]), name


def test_names_are_unique_and_bounds_are_those_that_are_promised():
    assert len(BY_NAME) == len(ROWS)
    bounds = {"pipeline, images": ("psnr", 45.0), "pipeline, final latents": ("max", 1e-3)}
    for row in ROWS:
        others = ("l2", 2e-2) if row.dtype == "bf16" else ("max", 1e-4)
        assert (row.measure, row.bound) == bounds.get(row.model, others), row.name


def test_check_fails_on_a_row_over_its_bound_or_without_a_result_and_passes_within(
    tmp_path, monkeypatch, capsys
):
    def result(largest: float) -> dict:
        return {"error": {"max": largest, "l2": 1e-6}, "versions": {"jax": "1"}}

    answers = {"vae SD": result(1e-3), "vae SDXL": {"failed": "ours: no file"}}
    monkeypatch.setattr(parity, "measure", lambda row, _: answers.get(row.name, result(1e-6)))

    def run(*flags: str) -> int:
        return parity.main([*flags, "--out", str(tmp_path / "parity.md")])

    assert run("--only", "vae SD", "--check") == 1
    assert "over: vae SD, vae SDXL" in capsys.readouterr().out
    text = (tmp_path / "parity.md").read_text()
    assert "Not measured yet: transformer tiny, " in text and "**1.0e-03, over**" in text
    assert "| failed |" in text
    assert run("--only", "vae SD") == 0  # reported, not checked
    assert run("--only", "t5", "--check", "--quick") == 0
    # the results of an earlier call are kept; T5-XXL whole needs --slow
    kept = list(json.loads((tmp_path / "parity.json").read_text()))
    quick = [row.name for row in QUICK if row.name.startswith("t5")]
    assert kept == [*quick, "vae SD", "vae SDXL", "vae SD bf16"]
    assert run("--only", "t5 XXL whole", "--check") == 2
    assert "--list" in capsys.readouterr().err


def test_a_reference_of_nothing_or_outputs_that_do_not_fit_are_no_parity():
    one = np.ones((2, 3))
    assert errors(one, one, "x") == {"max": 0.0, "l2": 0.0}
    cases = (
        (one * 0, one * 0, "nothing"),
        (one[:1], one, "beside"),
        (one * np.nan, one, "not finite"),
    )
    for ours, theirs, says in cases:
        with pytest.raises(ValueError, match=says):
            errors(ours, theirs, "x")
    row = BY_NAME["vae tiny"]
    with pytest.raises(ValueError, match="beside"):
        row.compare({"mean": one}, {"std": one})
    image = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    assert errors(image, image, "x")["psnr"] == 99.0
    assert errors(image + np.uint8(1), image, "x")["psnr"] == pytest.approx(48.13, abs=0.01)


def one_line(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, parity.__file__, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_one_row_is_one_line_of_json_with_a_process_a_side():
    result = one_line("--row", "vae tiny")
    assert BY_NAME["vae tiny"].holds(result["error"])
    assert set(result["versions"]) >= {"jax", "torch", "diffusers"}


def test_a_row_that_breaks_says_which_side_and_why(tmp_path):
    broken = dataclasses.replace(BY_NAME["vae tiny"], name="no such row")
    assert parity.measure(broken) == {
        "failed": "theirs: error: no row 'no such row': --list names them"
    }


@pytest.mark.slow
def test_xl_2_holds_at_256_px(whole_memory):
    row = BY_NAME["transformer XL/2 256"]
    result = one_line("--row", row.name)
    print(result)
    assert row.holds(result["error"])

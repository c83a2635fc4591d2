"""The benchmarks of speed: both sides compute the same, tables and searches say what they should,
and the GPU's script runs through."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from benchmarks.speed import inputs, record, table
from benchmarks.speed.cases import Case, sizes
from benchmarks.speed.contest import Contender, relative_errors, row
from benchmarks.speed.largest_batch import largest
from benchmarks.speed.peer_training import Process
from pixart_jax import diffusion
from pixart_jax.models.flops import sampling_flops, train_flops

pytestmark = pytest.mark.usefixtures("optimized")
CASE = Case("train", "tiny", 32, 4, "float32")
OURS, PEER = (
    Contender("pixart_jax", "ours"),
    Contender("diffusers eager", "peer", (("compile", "none"),)),
)
LIMITS = {
    "ours": {"product": 4e12, "copy": 1e9, "side": 64},
    "peer": {"product": 2e12, "copy": 2e9, "side": 64},
}


def found(seconds, **more) -> dict:
    return {
        "seconds": seconds,
        "first_seconds": 9.0,
        "peak_bytes": 2**30,
        "result": {"loss": np.array(2.0)},
        **more,
    }


def test_the_loss_written_out_for_the_peer_is_ours():
    rng = np.random.default_rng(0)
    x0, noise = (rng.standard_normal((6, 4, 4, 4), np.float32) for _ in range(2))
    output, t = rng.standard_normal((6, 4, 4, 8), np.float32), np.array([0, 1, 2, 300, 998, 999])
    ours = diffusion.training_loss(output, x0, noise, t)

    def latents(array):
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    process, times = Process(), torch.from_numpy(t)
    for n in range(len(t)):
        one = [latents(a[n : n + 1]) for a in (output, x0, noise)]
        theirs = process.loss(
            one[0],
            one[1],
            process.noised(one[1], one[2], times[n : n + 1]),
            one[2],
            times[n : n + 1],
        )
        assert float(theirs) == pytest.approx(float(ours["mse"][n] + ours["vb"][n]), rel=1e-4), t[n]


def test_the_first_draws_are_those_that_our_step_draws():
    made = inputs.make(CASE)
    keys = jax.random.split(jax.random.key(inputs.STEP_KEY), 4)
    noise = [jax.random.normal(jax.random.split(key, 4)[2], made["mean"].shape[1:]) for key in keys]
    np.testing.assert_allclose(made["first_noise"], np.stack(noise), rtol=1e-6)
    assert made["first_t"].shape == (4,) and made["text_states"].shape == (
        4,
        120,
        CASE.config.caption_width,
    )


@pytest.mark.parametrize("limit", [0.5, 3.0, 9.9, 55.0, 640.0, 1e9])
def test_the_largest_batch_is_found_with_few_compiles_and_never_one_that_does_not_fit(limit):
    asked = []

    def bytes_of(batch: int) -> float:
        asked.append(batch)
        return 0.6 + batch + 0.001 * batch**1.5

    batch = largest(bytes_of, limit, first=32, unit=8, most=4096)
    fits = [n for n in range(1, 4097) if 0.6 + n + 0.001 * n**1.5 <= limit]
    best = max(fits, default=0)
    assert batch == (min(best, 4096) if best < 8 else best // 8 * 8)
    assert len(asked) == len(set(asked)) <= 10


def test_ratio_share_and_compile_time_are_of_the_medians():
    ours, peer = found([1.0, 3.0, 2.0]), found([5.0, 3.0, 4.0], result={"loss": np.array(2.2)})
    made = row(CASE, PEER, peer, ours, LIMITS, "NVIDIA H200")
    assert (made["median"], made["best"], made["ratio"], made["compile_seconds"]) == (
        4.0,
        3.0,
        0.5,
        5.0,
    )
    assert (
        made["flop_per_second"] == CASE.flops / 4.0
        and made["share_of_limit"] == CASE.flops / 4.0 / 4e12
    )
    assert made["mfu"] is None  # float32 is no share of a bfloat16 peak
    assert made["errors"]["loss"] == pytest.approx(0.2 / 2.2)
    narrow = row(
        dataclasses.replace(CASE, dtype="bfloat16"),
        OURS,
        found([2.0], compile_seconds=1.5),
        ours,
        LIMITS,
        "NVIDIA H200",
    )
    assert (
        narrow["mfu"] == pytest.approx(CASE.flops / 2 / 989.4e12)
        and narrow["compile_seconds"] == 1.5
        and narrow["ratio"] is None
    )


def test_a_side_that_failed_leaves_the_other_without_a_ratio_and_says_why():
    assert row(CASE, OURS, {"failed": "no memory"}, None, LIMITS, "cpu")["failed"] == "no memory"
    alone = row(CASE, PEER, found([1.0]), None, LIMITS, "cpu")
    assert alone["ratio"] is None and alone["errors"] is None


def test_outputs_that_are_no_numbers_are_infinitely_wrong():
    assert relative_errors({"x": np.array([1.0, np.nan])}, {"x": np.ones(2)}) == {"x": float("inf")}


def test_the_table_has_a_row_a_side_the_ratio_and_what_failed():
    rows = [
        row(CASE, OURS, found([1.0]), found([1.0]), LIMITS, "cpu"),
        row(CASE, PEER, found([2.0]), found([1.0]), LIMITS, "cpu"),
    ]
    rows.append(
        row(
            CASE,
            dataclasses.replace(PEER, label="diffusers compiled"),
            {"failed": "out of memory"},
            None,
            LIMITS,
            "cpu",
        )
    )
    run = {
        "rows": rows,
        "limits": {"float32": LIMITS},
        "machine": {"device": "cpu", "cores": 2, "versions": {"jax": "0.10.2"}},
    }
    text = table.tables([run, {"part": "train", "status": "failed", "seconds": 3.0}])
    assert "| tiny | 32 | 4 | float32 | pixart_jax | 1 | 1 |" in text and "**0.500**" in text
    assert (
        "- 32 px, batch 4, diffusers compiled: out of memory" in text
        and "- train: failed after 3 s" in text
    )
    assert "jax 4, torch 2 TFLOP/s" in text and "MFU" not in text


def test_runs_are_added_to_a_file_and_what_lay_in_it_stays(tmp_path):
    path = tmp_path / "figures.json"
    first = record.Record(path, "one")
    first.write()
    first.run["rows"].append({"size": "32"})
    first.write()
    record.main([str(path), "train", "done", "12"])
    record.Record(path, "two").write()
    runs = record.runs_of(path)
    assert [run.get("command", run.get("part")) for run in runs] == [
        "one",
        "train",
        "two",
    ] and runs[0]["rows"] == [{"size": "32"}]


def test_sizes_and_flops_of_a_case():
    assert sizes("256,1024ms") == [(256, False), (1024, True)]
    big = Case("sample", "XL/2", 1024, 16, "bfloat16", True)
    assert big.config.size_conditions and big.config.sample_size == 128
    assert big.flops == 16 * sampling_flops(big.config, 1024, 1024, 120)
    assert CASE.flops == 4 * train_flops(CASE.config, 32, 32, 120)


def run_script(root, name: str, *flags: str, tmp_path) -> list[dict]:
    file = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(root / "benchmarks" / name),
        "--model",
        "tiny",
        "--px",
        "32",
        "--repeat",
        "2",
        "--peer-backend",
        "eager",
    ]
    done = subprocess.run(
        [*command, *flags, "--json", str(file)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())["runs"][-1]["rows"]


@pytest.mark.slow
def test_a_contest_of_the_forward_pass_has_both_sides_of_one_output(root, tmp_path):
    rows = run_script(root, "forward.py", "--peer-compile", "none", tmp_path=tmp_path)
    assert [made["side"] for made in rows] == ["pixart_jax", "diffusers eager"]
    assert all(made["errors"]["output"] < 1e-4 and made["ratio"] > 0 for made in rows[1:])
    assert all(len(made["seconds"]) == 2 and made["peak_bytes"] > 0 for made in rows)


@pytest.mark.slow
def test_the_gpu_script_runs_every_part_in_its_rehearsal(root, tmp_path):
    out = tmp_path / "figures.json"
    environment = {**os.environ, "PYTHON": sys.executable}
    script = ["bash", str(root / "benchmarks" / "gpu.sh")]
    done = subprocess.run(
        [*script, "--rehearse", "--minutes", "25", "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = json.loads(out.read_text())["runs"]
    parts = subprocess.run(
        [*script, "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert [(run["part"], run["status"]) for run in runs if "part" in run] == [
        (part, "done") for part in parts
    ]
    rows = [made for run in runs for made in run.get("rows", ())]
    assert {made["case"]["kind"] for made in rows} == {"train", "sample", "draw"} and not any(
        "failed" in made for made in rows
    )
    for made in rows:
        if (
            made["side"] != "pixart_jax"
            and made["case"]["kind"] == "train"
            and "diffusers" in made["side"]
        ):
            assert made["errors"]["loss"] < 1e-4 and made["errors"]["grad_norm"] < 1e-4
    assert "Attention beside fp32" in done.stdout


def test_the_gpu_script_refuses_what_it_does_not_know(root):
    for flags in (["--onyl", "x"], ["--only", "trian"]):
        done = subprocess.run(
            ["bash", str(root / "benchmarks" / "gpu.sh"), *flags], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.startswith("error:")

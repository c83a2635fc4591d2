"""The benchmarks of speed: both sides compute the same, the search of the largest batch is exact,
and the GPU's script runs through."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from benchmarks.speed import inputs, table
from benchmarks.speed import ours as sides
from benchmarks.speed.cases import Case, sizes
from benchmarks.speed.compiled import largest
from benchmarks.speed.contest import Contender, row
from benchmarks.speed.peer_loss import DiffusionLoss
from pixart_jax import diffusion
from pixart_jax.models.flops import forward_flops, train_flops

pytestmark = pytest.mark.usefixtures("optimized")
SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
CASE = Case("train", "tiny", 32, 4, "float32")
OURS = Contender("pixart_jax", "ours")
PEER = Contender("diffusers eager", "peer", {"compile": "none"})
LIMITS = {
    "ours": {"product": 4e12, "copy": 1e9, "side": 64},
    "peer": {"product": 2e12, "copy": 2e9, "side": 64},
}


def found(seconds, loss=2.0, **more) -> dict:
    result = {"loss": np.array(loss)}
    figures = {"seconds": seconds, "first_seconds": 9.0, "peak_bytes": 2**30, "result": result}
    return figures | more


def test_the_loss_written_for_the_peer_is_ours():
    rng = np.random.default_rng(0)
    x0, noise = (rng.standard_normal((6, 4, 4, 4), np.float32) for _ in range(2))
    output, t = rng.standard_normal((6, 4, 4, 8), np.float32), np.array([0, 1, 2, 300, 998, 999])
    ours = diffusion.training_loss(output, x0, noise, t)
    process, times = DiffusionLoss(), torch.from_numpy(t)
    for n in range(len(t)):
        out, clean, eps = (
            torch.from_numpy(a[n : n + 1]).permute(0, 3, 1, 2) for a in (output, x0, noise)
        )
        at = times[n : n + 1]
        theirs = process.loss(out, clean, process.noised(clean, eps, at), eps, at)
        assert float(theirs) == pytest.approx(float(ours["mse"][n] + ours["vb"][n]), rel=1e-4), t[n]


def test_the_first_draws_are_those_that_our_step_draws():
    made = inputs.make(CASE)
    keys = jax.random.split(jax.random.key(inputs.STEP_KEY), 4)
    noise = [jax.random.normal(jax.random.split(key, 4)[2], made["mean"].shape[1:]) for key in keys]
    np.testing.assert_allclose(made["first_noise"], np.stack(noise), rtol=1e-6)
    assert made["text_states"].shape == (4, 120, CASE.config.caption_width)


@pytest.mark.parametrize("limit", [0.5, 3.0, 9.9, 55.0, 640.0, 1e9])
def test_the_largest_batch_is_found_with_few_compiles_and_never_one_that_does_not_fit(limit):
    asked = []

    def bytes_of(batch: int) -> float:
        asked.append(batch)
        return 0.6 + batch + 0.001 * batch**1.5

    batch = largest(bytes_of, limit, first=32, unit=8, maximum=4096)
    fits = [n for n in range(1, 4097) if 0.6 + n + 0.001 * n**1.5 <= limit]
    best = max(fits, default=0)
    assert batch == (min(best, 4096) if best < 8 else best // 8 * 8)
    assert len(asked) == len(set(asked)) <= 10


def test_ratio_share_error_and_compile_time_are_of_the_medians():
    ours, peer = found([1.0, 3.0, 2.0]), found([5.0, 3.0, 4.0], loss=2.2)
    made = row(CASE, PEER, peer, ours, LIMITS, "NVIDIA H200")
    assert (made["median"], made["best"], made["ratio"]) == (4.0, 3.0, 0.5)
    assert made["compile_seconds"] == 5.0 and made["flop_per_second"] == CASE.flops / 4.0
    assert made["share_of_limit"] == CASE.flops / 4.0 / 4e12
    assert made["mfu"] is None  # float32 is no share of a bfloat16 peak
    assert made["errors"]["loss"] == pytest.approx(0.2 / 2.2)
    narrow = dataclasses.replace(CASE, dtype="bfloat16")
    made = row(narrow, OURS, found([2.0], compile_seconds=1.5), ours, LIMITS, "NVIDIA H200")
    assert made["mfu"] == pytest.approx(CASE.flops / 2 / 989.4e12)
    assert made["compile_seconds"] == 1.5 and made["ratio"] is None
    infinite = row(CASE, PEER, found([1.0], loss=np.nan), ours, LIMITS, "cpu")
    assert infinite["errors"] == {"loss": float("inf")}


def test_a_side_that_failed_is_in_the_table_and_leaves_the_other_without_a_ratio(tmp_path):
    alone = row(CASE, PEER, found([1.0]), {"failed": "no memory"}, LIMITS, "cpu")
    assert alone["ratio"] is None and alone["errors"] is None
    rows = [
        row(CASE, OURS, found([1.0]), found([1.0]), LIMITS, "cpu"),
        row(CASE, PEER, found([2.0]), found([1.0]), LIMITS, "cpu"),
        row(CASE, PEER, {"failed": "out of memory"}, {}, LIMITS, "cpu"),
    ]
    path = tmp_path / "figures.json"
    record = table.Record(path, ["--px", "32"])
    record.run |= {"rows": rows, "limits": {"float32": LIMITS}}
    record.write()
    table.main([str(path), "--part", "train", "failed", "3"])
    text = table.tables(table.runs_of(path))
    assert "| tiny | 32 | 4 | float32 | pixart_jax | 1 | 1 |" in text and "**0.500**" in text
    assert "- 32 px, batch 4, diffusers eager: out of memory" in text
    assert "- train: failed after 3 s" in text
    assert "jax 4, torch 2 TFLOP/s" in text and "MFU" not in text
    assert set(table.KINDS) == set(sides.KINDS)  # no kind of work is measured and not shown


def test_sizes_and_flops_of_a_case():
    assert sizes("256,1024ms") == [(256, False), (1024, True)]
    big = Case("sample", "XL/2", 1024, 16, "bfloat16", True)
    assert big.config.size_conditions and big.config.sample_size == 128
    c, once = big.config, forward_flops(big.config, 1024, 1024, 120)
    text = 120 * (2 * (c.caption_width * c.width + c.width**2) + c.depth * 4 * c.width**2)
    assert big.flops == 16 * 2 * (big.steps * once - (big.steps - 1) * text)
    assert CASE.flops == 4 * train_flops(CASE.config, 32, 32, 120)


@pytest.mark.slow
def test_the_gpu_script_runs_every_part_in_its_rehearsal(root, tmp_path):
    out = tmp_path / "figures.json"
    script = ["bash", str(root / "benchmarks" / "gpu.sh")]
    done = subprocess.run(
        [*script, "--rehearse", "--minutes", "25.5", "--out", str(out)],
        env={**os.environ, "PYTHON": sys.executable, "OUT": "not to be changed"},
        capture_output=True,
        text=True,
        timeout=1600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    runs = json.loads(out.read_text())["runs"]
    listed = subprocess.run([*script, "--list"], capture_output=True, text=True, check=True)
    parts = [(run["part"], run["status"]) for run in runs if "part" in run]
    assert parts == [(part, "done") for part in listed.stdout.split()]
    rows = [made for run in runs for made in run.get("rows", ())]
    assert {made["case"]["kind"] for made in rows} == {"train", "sample", "draw"}
    assert not any("failed" in made for made in rows)
    peers = [made for made in rows if made["side"].startswith("diffusers")]
    assert all(error < 1e-3 for made in peers for error in made["errors"].values())
    assert all(made["ratio"] > 0 and made["peak_bytes"] > 0 for made in peers)
    assert "Attention beside fp32" in done.stdout


@pytest.mark.parametrize("flags", [("--onyl", "x"), ("--only", "trian"), ("--minutes", "six")])
def test_the_gpu_script_refuses_flags_that_it_does_not_have(root, flags):
    command = ["bash", str(root / "benchmarks" / "gpu.sh"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error:")


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_imports(script):
    importlib.import_module(f"benchmarks.{script.stem}")

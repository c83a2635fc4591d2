"""The ways to compute projections that share an input, as benchmarks/fused_projections.py times
them: other products, the same numbers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fused_projections as fused
from benchmarks.speed.cases import Case
from pixart_jax.config import MeshConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.planning.arithmetic import products
from pixart_jax.weights.component import Transformer

pytestmark = pytest.mark.usefixtures("optimized")
CASE = Case("forward", "tiny", 32, 2, "float32")
WAYS = {way.name: way for way in fused.WAYS}


@pytest.fixture(scope="module")
def given():
    """(module, parameters, the other arguments of a loss)."""
    params = fused.random_params(CASE, make_mesh(MeshConfig(), jax.devices()[:1]))
    keys = jax.random.split(jax.random.key(1), 2)
    text = jax.random.normal(keys[1], (2, 12, CASE.config.caption_width))
    inputs = (
        jax.random.normal(keys[0], (2, 4, 4, 4)),
        jnp.array([3.0, 700.0]),
        text,
        jnp.array([12, 5]),
    )
    return Transformer(CASE.config, params).module, params, inputs


def traced(given, way: fused.Way):
    module, params, inputs = given

    def loss(params):
        with fused.computing(way):
            return jnp.square(module.apply({"params": fused.prepared(way, params)}, *inputs)).sum()

    return jax.jit(jax.grad(loss)).trace(params)


@pytest.mark.slow
def test_every_way_gives_the_gradients_of_the_parameters_as_they_are(given):
    # the code generator's passes are most of a compile's time
    quick = {"xla_backend_optimization_level": 0}
    found = {
        name: traced(given, way).lower().compile(quick)(given[1]) for name, way in WAYS.items()
    }
    whole = found.pop("three products")
    for name, gradients in found.items():
        assert jax.tree.structure(gradients) == jax.tree.structure(whole)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(
                ours, theirs, atol=1e-5 * float(np.abs(theirs).max()) + 1e-8, err_msg=name
            )


def test_a_way_has_fewer_products_and_as_much_arithmetic(given):
    def written(way) -> int:
        return traced(given, WAYS[way]).lower().as_text().count("stablehlo.dot_general")

    whole = written("three products")
    for way in (
        "q, k, v side by side, in the block",
        "q, k, v side by side, ahead",
        "q, k, v stacked, ahead",
    ):
        assert whole - written(way) == 3 * 2  # forward, and for each of the two gradients
    assert whole - written("the text's k, v side by side, ahead") == 3 * 1
    assert whole - written("both side by side, ahead") == 3 * 3
    assert len({products(traced(given, way).jaxpr.jaxpr).flops for way in WAYS.values()}) == 1


def test_the_sampler_is_traced_the_ways_way():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    case = dataclasses.replace(CASE, kind="sample", steps=2)
    written = [
        fused.drawing_of(case, way, mesh).lower().as_text().count("stablehlo.dot_general")
        for way in fused.WAYS
    ]
    # once in the loop over the blocks; the texts' of either half
    assert [written[0] - n for n in written] == [0, 2, 2, 2, 2, 4]


@pytest.mark.slow
def test_the_script_times_all_works_by_turns(root, tmp_path):
    file = tmp_path / "figures.json"
    script = [
        sys.executable,
        str(root / "benchmarks" / "fused_projections.py"),
        "--model",
        "tiny",
        "--px",
        "32",
        "--repeat",
        "2",
    ]
    done = subprocess.run(
        [*script, "--ways", "1,3", "--json", str(file)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads(file.read_text())["runs"][-1]
    rows = [dict(zip(run["columns"], cells, strict=True)) for cells in run["cells"]]
    assert [row["work"] for row in rows] == ["forward"] * 2 + ["sample"] * 2 + ["train"] * 2
    assert all(float(row["ratio"]) > 0 for row in rows if row["projections"] != "three products")
    assert "Projections that share an input" in done.stdout

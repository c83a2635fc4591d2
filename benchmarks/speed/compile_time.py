"""How long the train step and the sampler take to be traced and compiled: in a fresh process
without and with what an earlier one kept."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.speed import machine
from benchmarks.speed.cases import Case
from benchmarks.speed.record import Record
from benchmarks.speed.table import render

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "work",
    "model",
    "px",
    "batch",
    "dtype",
    "cache",
    "trace s",
    "lower s",
    "compile or load s",
    "together s",
    "imports s",
)
STARTS = ("cold", "warm", "warm again")


def measure(argv, flags, of: list[tuple[Case, dict]]) -> int:
    """Each case in three fresh processes that share a cache folder: the first finds it empty. The
    table to standard output."""
    found, cells = [], []
    for case, how in of:
        with tempfile.TemporaryDirectory(prefix="compiled.") as cache:
            for start in STARTS:
                one = _one(case, how, cache)
                found.append({"case": dataclasses.asdict(case), "how": how, "start": start, **one})
                name = (
                    "train step" + "".join(f", {key} {value}" for key, value in how.items())
                    if case.kind == "train"
                    else "sampler"
                )
                times = [one[key] for key in ("trace", "lower", "compile")]
                shown = [f"{seconds:.2f}" for seconds in (*times, sum(times), one["imports"])]
                cells.append(
                    [name, case.model, case.size, str(case.batch), case.dtype, start, *shown]
                )
                print(" | ".join(cells[-1]), file=sys.stderr, flush=True)
    record = Record(flags.json, " ".join(["python", Path(sys.argv[0]).name, *argv]))
    record.run |= {
        "compile_times": found,
        "columns": list(COLUMNS),
        "cells": cells,
        "title": "Compile time",
    }
    record.write()
    print(render(COLUMNS, cells, "Compile time"), end="")
    return 0


def _one(case: Case, how: dict, cache: str) -> dict:
    """{'imports', 'trace', 'lower', 'compile'}: seconds in a fresh process."""
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.compile_time",
        json.dumps(dataclasses.asdict(case)),
        json.dumps(how),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def traced_sampler(case: Case):
    """Pipeline.denoise, traced from shapes alone, as one device would hold them."""
    import jax
    import jax.numpy as jnp

    from pixart_jax.config import MeshConfig
    from pixart_jax.models.vae import VAEConfig
    from pixart_jax.parallel.mesh import make_mesh
    from pixart_jax.pipeline import Pipeline
    from pixart_jax.weights.component import VAE, Transformer

    shapes = Transformer.abstract(
        case.config, case.dtype, make_mesh(MeshConfig(), jax.devices()[:1])
    ).params
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    pipeline = Pipeline(Transformer(case.config, {}, case.dtype), None, VAE(VAEConfig(), {}), None)
    b, side = case.batch, case.px // pipeline.factor
    states = jax.ShapeDtypeStruct((b, case.text_tokens, case.config.caption_width), jnp.float32)
    lengths, noise = (
        jax.ShapeDtypeStruct((b,), jnp.int32),
        jax.ShapeDtypeStruct((b, side, side, case.config.in_channels), jnp.float32),
    )

    def run(params, states, lengths, noise, negative, negative_lengths):
        filled = pipeline.replace(transformer=pipeline.transformer.replace(params=params))
        return filled.denoise(
            states,
            lengths,
            noise,
            negative,
            negative_lengths,
            steps=case.steps,
            guidance=case.guidance,
        )

    return jax.jit(run).trace(params, states, lengths, noise, states, lengths)


def main(case: Case, how: dict) -> None:
    begun = time.perf_counter()
    import jax

    from benchmarks.speed import ours

    jax.devices()
    imported = time.perf_counter()
    traced = (
        ours.traced_step(case, how["remat"])[1] if case.kind == "train" else traced_sampler(case)
    )
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    found = {
        "imports": imported - begun,
        "trace": after_trace - imported,
        "lower": after_lower - after_trace,
    }
    print(json.dumps(found | {"compile": done - after_lower, "peak_bytes": machine.peak_bytes()}))


if __name__ == "__main__":
    main(Case(**json.loads(sys.argv[1])), json.loads(sys.argv[2]))

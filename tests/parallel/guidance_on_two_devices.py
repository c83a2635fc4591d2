"""Draw one prompt with guidance on 1 device and on 2 simulated ones; print as JSON how they differ.
Needs XLA's 2 host devices.

python guidance_on_two_devices.py FOLDER PROMPT: FOLDER is a model.
"""

from __future__ import annotations

import json
import sys

import jax
import numpy as np

from pixart_jax import Pipeline
from pixart_jax.config import MeshConfig
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.pipeline import sampler


def generated(pipe, prompt: str, monitored: list) -> tuple[np.ndarray, np.ndarray]:
    """(latents [b, h, w, c] of the compiled scan, images); monitored: what the scan's program costs
    a device is put there."""
    run, seen = sampler.generate_jit, []

    def watched(spec, decode, vae_params, *arguments):
        # without the VAE, whose rows each device has of its own
        scan = sampler.sample_latents_jit.lower(spec, *arguments)
        monitored.append(scan.compile().cost_analysis()["flops"])
        seen.append(run(spec, decode, vae_params, *arguments))
        return seen[-1]

    sampler.generate_jit = watched
    try:
        images = pipe([prompt], steps=4, seed=3)
    finally:
        sampler.generate_jit = run
    return np.asarray(seen[0][0]), images


def main(folder: str, prompt: str) -> None:
    single: list[float] = []
    latents, images = generated(Pipeline.from_pretrained(folder), prompt, single)
    found = {}
    for name in ("data=2", "fsdp=2,data=1"):
        flops: list[float] = []
        mesh = make_mesh(MeshConfig.parse(name), jax.devices())
        ours, others = generated(Pipeline.from_pretrained(folder, mesh=mesh), prompt, flops)
        found[name] = {
            "rows": len(ours),
            "latents": float(np.abs(ours - latents).max() / np.abs(latents).max()),
            "images": int(np.abs(others.astype(int) - images).max()),
            "work": flops[0] / single[0],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

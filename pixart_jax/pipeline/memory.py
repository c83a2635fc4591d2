"""Whether the text encoder fits beside the rest of a model, or has to go before the denoising
begins."""

from __future__ import annotations

import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.weights.files import TORCH_SUFFIXES, find_weights, open_tensors

OFFLOADS = ("auto", "always", "never")
# of a device's memory that parameters may take; the rest is for activations, the VAE's above all
_SHARE = 0.6


def should_offload(
    folder: str | os.PathLike,
    dtype=None,
    mesh: jax.sharding.Mesh | None = None,
    quantization: str | None = None,
) -> bool:
    """Whether all parts of a model folder together would take more than 0.6 of the memory of one of
    the devices.

    The parts' sizes are their tensors' on disk, in the dtype that each is held in. A device's
    memory is what ``memory_stats()['bytes_limit']`` says; on a CPU it is MemAvailable of
    /proc/meminfo, which all its devices share. A device that does not say counts as too small: to
    encode all texts first costs little, and the images are the same.
    """
    sizes = {
        part: parameters(Path(folder) / part) for part in ("transformer", "text_encoder", "vae")
    }
    held = jnp.dtype(dtype or jnp.float32).itemsize
    needed = sum(
        size * (1 if quantization and part == "text_encoder" else held)
        for part, size in sizes.items()
    )
    device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
    if device.platform == "cpu":
        copies = 1 if mesh is None else mesh.devices.size // _cuts(mesh)
        return needed * copies > _SHARE * available()
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit is None or needed / _cuts(mesh) > _SHARE * limit


def parameters(folder: str | os.PathLike) -> int:
    """Parameters in a component folder, from the files' headers; a PyTorch file's, which has none,
    by its size as fp32."""
    path = find_weights(folder)
    if path.name.removesuffix(".index.json").endswith(TORCH_SUFFIXES):
        return (
            sum(
                file.stat().st_size
                for file in Path(folder).iterdir()
                if file.suffix in TORCH_SUFFIXES
            )
            // 4
        )
    tensors = open_tensors(path)
    return sum(int(np.prod(tensors.shape(key))) for key in tensors)


def available() -> float:
    """Bytes of main memory that programs can still have; endless where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else math.inf


def _cuts(mesh: jax.sharding.Mesh | None) -> int:
    """Parts that a mesh cuts parameters into."""
    return 1 if mesh is None else mesh.shape["fsdp"] * mesh.shape["tensor"]

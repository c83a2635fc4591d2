"""Images a second through FID's Inception network, beside PyTorch with the same random weights.

    python benchmarks/fid.py --images 128                 on a CPU: both on it
    python benchmarks/fid.py --images 4096 --batch 256    on a GPU: both on it, fp32
    python benchmarks/fid.py --images 8 --repeat 1        a rehearsal

Both read the same images, resized to 299 px, in the same batches, by turns; compilation and one
batch to warm up are not counted. The peer is the same layers in PyTorch's functions, as
torch-fidelity's module runs them (tests/evaluation/torch_inception.py). Figures are medians. Exit
status 1 where the features differ by more than 1e-4 of their largest, or where the peer is faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pixart_jax import cli  # noqa: E402
from pixart_jax.evaluation import inception  # noqa: E402


def ours(net: inception.Inception) -> Callable[[np.ndarray], np.ndarray]:
    params = jax.device_put(net.params)
    return lambda pixels: np.asarray(inception.apply(params, pixels)["pool"])


def peer(tensors: dict[str, np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """pixels [b, 299, 299, 3] → pool features, in PyTorch."""
    import torch

    from tests.evaluation.torch_inception import in_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    weights = {name: torch.from_numpy(value).to(device) for name, value in tensors.items()}

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
        return in_torch(weights, x)["pool"]

    return run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 128), ("batch", 16), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args(argv)
    tensors = inception.random_tensors(0)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (flags.batch, inception.SIDE, inception.SIDE, 3)).astype("f4")
    sides = {"pixart_jax": ours(inception.from_tensors(tensors, "random")), "torch": peer(tensors)}
    first = {name: run(pixels) for name, run in sides.items()}
    batches = max(1, flags.images // flags.batch)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.repeat):
        for name, run in sides.items():
            start = time.perf_counter()
            for _ in range(batches):
                run(pixels)
            rates[name].append(batches * flags.batch / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    largest = np.abs(first["torch"]).max()
    off = float(np.abs(first["pixart_jax"] - first["torch"]).max() / largest)
    ratio = medians["pixart_jax"] / medians["torch"]
    rows = "   ".join(f"{name} {rate:.2f} images/s" for name, rate in medians.items())
    print(f"{rows}   ratio {ratio:.2f}   features differ by {off:.1e}")
    return int(off > 1e-4 or ratio < 1)


if __name__ == "__main__":
    sys.exit(cli.run(main))

"""Images a second through FID's Inception network, beside PyTorch with the same random weights.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/fid.py --images 128
                                                          on a CPU of two cores: both on it
    python benchmarks/fid.py --images 4096 --batch 256    on a GPU: both on it, fp32
    python benchmarks/fid.py --images 8 --repeat 1        a rehearsal

Both read the same images, uint8 at 299 px, in the same batches, by turns; compilation and one batch
to warm up are not counted. The peer is torch-fidelity's module where that is installed (``pip
install --no-deps torch-fidelity``; its module is imported alone, without its resizing), else the
same layers in PyTorch's functions (tests/evaluation/torch_inception.py). Figures are medians. Exit
status 1 where the features differ by more than 1e-4 of their largest, or where the peer is faster.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pixart_jax import cli  # noqa: E402
from pixart_jax.evaluation import features, inception  # noqa: E402


def ours(net: inception.Inception) -> Callable[[np.ndarray], np.ndarray]:
    network = features.on_devices(net, "tensorflow")

    def run(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(network.compute((pixels.astype("f4") - 128) / 128, None)["pool"])

    return run


def peer(tensors: dict[str, np.ndarray]) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """(name, pixels uint8 [b, 299, 299, 3] → pool features), in PyTorch."""
    import torch

    from tests.evaluation.torch_inception import in_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False
    weights = {name: torch.from_numpy(value).to(device) for name, value in tensors.items()}
    name, spec = "torch", importlib.util.find_spec("torch_fidelity")

    def network(x: torch.Tensor) -> np.ndarray:
        return in_torch(weights, (x.float() - 128) / 128)["pool"]

    if spec is not None:
        name, package = "torch-fidelity", types.ModuleType("torch_fidelity")
        package.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["torch_fidelity"] = package  # its own would import torchvision
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        module.interpolate_bilinear_2d_like_tensorflow1x = lambda x, **_: x
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            torch.save(weights, file.name)
            net = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=file.name
            ).to(device)

        def network(x: torch.Tensor) -> np.ndarray:
            return net(x)[0].cpu().numpy()

    @torch.inference_mode()
    def run(pixels: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))

    return name, run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("images", 128), ("batch", 16), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args(argv)
    tensors = inception.random_tensors(0)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (flags.batch, inception.SIDE, inception.SIDE, 3), np.uint8)
    name, theirs = peer(tensors)
    sides = {"pixart_jax": ours(inception.from_tensors(tensors, "random")), name: theirs}
    first = {side: run(pixels) for side, run in sides.items()}
    batches = max(1, flags.images // flags.batch)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(flags.repeat):
        for side, run in sides.items():
            start = time.perf_counter()
            for _ in range(batches):
                run(pixels)
            rates[side].append(batches * flags.batch / (time.perf_counter() - start))
    medians = {side: statistics.median(values) for side, values in rates.items()}
    off = float(np.abs(first["pixart_jax"] - first[name]).max() / np.abs(first[name]).max())
    ratio = medians["pixart_jax"] / medians[name]
    rows = "   ".join(f"{side} {rate:.2f} images/s" for side, rate in medians.items())
    print(f"{rows}   ratio {ratio:.2f}   features differ by {off:.1e}")
    return int(off > 1e-4 or ratio < 1)


if __name__ == "__main__":
    sys.exit(cli.run(main))
